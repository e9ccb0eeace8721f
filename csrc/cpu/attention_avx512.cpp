#include "attention.hpp"

#if defined(__AVX512F__)
#include "attention.inl.hpp"

namespace gangline {

AttendChunk avx512_attention() { return attend_chunk; }

}  // namespace gangline

#else

namespace gangline {

AttendChunk avx512_attention() { return nullptr; }

}  // namespace gangline

#endif
