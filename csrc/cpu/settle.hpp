// Where a sum of vectors is made, and not later.
#pragma once

namespace gangline {
namespace {

// GCC takes products and sums of vectors as parts of one expression. Left to itself it makes the products of a long unrolled
// block first, more of them than there are registers, and keeps them on the stack until it adds them up.
#if defined(__GNUC__) || defined(__clang__)
template <class Vector>
inline __attribute__((always_inline)) void settle(Vector& sum) {
    asm("" : "+v"(sum));
}
#else
template <class Vector>
inline void settle(Vector&) {}
#endif

}  // namespace
}  // namespace gangline
