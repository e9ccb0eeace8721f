#include "encode.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include "encode.inl.hpp"

namespace gangline {

bool encode_blocks_avx2(const EncodeJob& job, int begin, int end) { return encode_row_blocks(job, begin, end); }

}  // namespace gangline

#endif
