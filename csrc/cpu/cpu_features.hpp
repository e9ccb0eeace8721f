// What the processor can do and the operating system lets it do, asked at run time.
#pragma once

#include <map>
#include <string>

namespace gangline {

// Every known feature of this architecture, true where both the processor and the operating system support it.
// Features of another architecture are absent.
std::map<std::string, bool> cpu_features();

}  // namespace gangline
