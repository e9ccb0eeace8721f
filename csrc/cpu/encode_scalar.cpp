#include "encode.hpp"

#include "encode.inl.hpp"

namespace gangline {

bool encode_blocks_scalar(const EncodeJob& job, int begin, int end) { return encode_row_blocks(job, begin, end); }

}  // namespace gangline

