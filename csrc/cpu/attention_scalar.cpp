#define GANGLINE_SCALAR
#include "attention.inl.hpp"

namespace gangline {

AttendChunk scalar_attention() { return attend_chunk; }

}  // namespace gangline
