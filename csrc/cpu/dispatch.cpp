// Chooses the table of kernels: the widest that this processor runs, unless the environment or a test names another.

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "cpu_features.hpp"
#include "kernels.hpp"

namespace gangline {
namespace {

struct Choice {
    const Kernels* table;
    std::vector<const char*> needs;
};

std::vector<const Kernels*> usable_tables() {
    const std::map<std::string, bool> features = cpu_features();
    const Choice known[] = {
        {scalar_kernels(), {}},
        {neon_kernels(), {"neon", "dotprod"}},
        {avx2_kernels(), {"avx2", "fma", "f16c"}},
        {avx_vnni_kernels(), {"avx2", "fma", "f16c", "avx_vnni"}},
        {avx512_kernels(), {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}},
        {avx512_vnni_kernels(),
         {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
          "avx512_vbmi"}},
    };
    std::vector<const Kernels*> usable;
    for (const Choice& choice : known) {
        bool runs = choice.table != nullptr;
        for (const char* need : choice.needs) {
            const auto found = features.find(need);
            runs = runs && found != features.end() && found->second;
        }
        if (runs) usable.push_back(choice.table);
    }
    return usable;
}

const Kernels* find(const std::string& name) {
    std::string names;
    for (const Kernels* table : usable_tables()) {
        if (name == table->name) return table;
        names += std::string(names.empty() ? "" : ", ") + table->name;
    }
    throw std::runtime_error("kernels '" + name + "' cannot run on this processor; choose one of: " + names);
}

const Kernels* first_choice() {
    const char* named = std::getenv("GANGLINE_CPU");
    return named != nullptr && *named != '\0' ? find(named) : usable_tables().back();
}

// Null until first asked for, so that a wrong GANGLINE_CPU is an error of the call, not of the import.
std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = in_use.load(std::memory_order_acquire);
    if (table == nullptr) {
        table = first_choice();
        in_use.store(table, std::memory_order_release);
    }
    return *table;
}

void use_kernels(const std::string& name) { in_use.store(find(name), std::memory_order_release); }

std::vector<std::string> usable_kernels() {
    std::vector<std::string> names;
    for (const Kernels* table : usable_tables()) names.emplace_back(table->name);
    return names;
}

}  // namespace gangline
