#include "attention.hpp"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include "attention.inl.hpp"

namespace gangline {

AttendChunk neon_attention() { return attend_chunk; }

}  // namespace gangline

#else

namespace gangline {

AttendChunk neon_attention() { return nullptr; }

}  // namespace gangline

#endif
