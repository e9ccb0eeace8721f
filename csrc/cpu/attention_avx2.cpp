#include "attention.hpp"

#if defined(__AVX2__)
#include "attention.inl.hpp"

namespace gangline {

AttendChunk avx2_attention() { return attend_chunk; }

}  // namespace gangline

#else

namespace gangline {

AttendChunk avx2_attention() { return nullptr; }

}  // namespace gangline

#endif
