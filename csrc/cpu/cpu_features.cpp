// x86: cpuid says what the processor has; XCR0 (read by xgetbv) says which registers the operating system saves on a
// context switch. A feature counts only if both agree: AVX-512 without saved ZMM registers is an illegal instruction.
// AArch64: the kernel's own answer (auxiliary vector, sysctl), Advanced SIMD being part of the baseline.

#include "cpu_features.hpp"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)
#define GANGLINE_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define GANGLINE_ARM64 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace gangline {
namespace {

[[maybe_unused]] constexpr bool bit(std::uint64_t word, int index) { return ((word >> index) & 1U) != 0; }

#if defined(GANGLINE_X86)

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int out[4];
    __cpuid(out, 0);
    if (static_cast<std::uint32_t>(out[0]) < leaf) return r;
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]), static_cast<std::uint32_t>(out[2]),
         static_cast<std::uint32_t>(out[3])};
#else
    // Leaves the registers at zero, hence every feature at false, when the leaf does not exist.
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

// Extended control register 0. Only to be called when cpuid reports OSXSAVE.
std::uint64_t read_xcr0() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

std::map<std::string, bool> detect() {
    const Registers basic = cpuid(1, 0);
    const Registers extended = cpuid(7, 0);
    const Registers extended1 = extended.eax >= 1 ? cpuid(7, 1) : Registers{};

    const std::uint64_t xcr0 = bit(basic.ecx, 27) ? read_xcr0() : 0;
    constexpr std::uint64_t ymm = 0x6;          // XMM, YMM
    constexpr std::uint64_t zmm = 0xE6;         // ... and opmask, upper ZMM, ZMM16-31
    constexpr std::uint64_t tiles = 0x60000;    // AMX configuration and data
    const bool os_ymm = (xcr0 & ymm) == ymm;
    const bool os_zmm = (xcr0 & zmm) == zmm;
    const bool os_tiles = (xcr0 & tiles) == tiles;
    const bool avx512 = os_zmm && bit(extended.ebx, 16);
    const bool amx = os_tiles && bit(extended.edx, 24);

    return {
        {"pclmulqdq", bit(basic.ecx, 1)},
        {"sse4_1", bit(basic.ecx, 19)},
        {"sse4_2", bit(basic.ecx, 20)},
        {"avx", os_ymm && bit(basic.ecx, 28)},
        {"f16c", os_ymm && bit(basic.ecx, 29)},
        {"fma", os_ymm && bit(basic.ecx, 12)},
        {"avx2", os_ymm && bit(extended.ebx, 5)},
        {"avx_vnni", os_ymm && bit(extended1.eax, 4)},
        {"avx512f", avx512},
        {"avx512dq", avx512 && bit(extended.ebx, 17)},
        {"avx512bw", avx512 && bit(extended.ebx, 30)},
        {"avx512vl", avx512 && bit(extended.ebx, 31)},
        {"avx512_vbmi", avx512 && bit(extended.ecx, 1)},
        {"avx512_vnni", avx512 && bit(extended.ecx, 11)},
        {"avx512_bf16", avx512 && bit(extended1.eax, 5)},
        {"avx512_fp16", avx512 && bit(extended.edx, 23)},
        {"amx_tile", amx},
        {"amx_bf16", amx && bit(extended.edx, 22)},
        {"amx_int8", amx && bit(extended.edx, 25)},
    };
}

#elif defined(GANGLINE_ARM64)

#if defined(__APPLE__)
bool sysctl_flag(const char* name) {
    int value = 0;
    std::size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

std::map<std::string, bool> detect() {
    std::map<std::string, bool> found{
        {"neon", true}, {"dotprod", false}, {"i8mm", false}, {"bf16", false}, {"fp16", false}, {"sve", false}};
#if defined(__linux__)
    // Bit numbers of the kernel's user interface (asm/hwcap.h), spelled out so that old headers do.
    const std::uint64_t hwcap = getauxval(AT_HWCAP);
    const std::uint64_t hwcap2 = getauxval(AT_HWCAP2);
    found["fp16"] = bit(hwcap, 10);
    found["dotprod"] = bit(hwcap, 20);
    found["sve"] = bit(hwcap, 22);
    found["i8mm"] = bit(hwcap2, 13);
    found["bf16"] = bit(hwcap2, 14);
#elif defined(__APPLE__)
    found["fp16"] = sysctl_flag("hw.optional.arm.FEAT_FP16");
    found["dotprod"] = sysctl_flag("hw.optional.arm.FEAT_DotProd");
    found["i8mm"] = sysctl_flag("hw.optional.arm.FEAT_I8MM");
    found["bf16"] = sysctl_flag("hw.optional.arm.FEAT_BF16");
#endif
    return found;
}

#else

std::map<std::string, bool> detect() { return {}; }

#endif

}  // namespace

std::map<std::string, bool> cpu_features() { return detect(); }

}  // namespace gangline
