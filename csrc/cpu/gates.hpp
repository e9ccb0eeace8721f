// What stands between the gate/up product and the down projection, for every family of transformers.
#pragma once

#include <limits>
#include <string>

namespace gangline {

enum class Activation : int { identity, silu, gelu, gelu_tanh, relu, relu2 };
enum class Clamp : int {
    none,
    before,  // gate = min(gate, limit), up in [-limit, limit]
    after,   // act(gate) = min(act(gate), limit), up in [-limit, limit]
};

// Gated: h = act(gate) * (up + up_shift). Not gated: h = act(up). silu(x) = x * sigmoid(alpha * x).
struct Gate {
    Activation activation = Activation::silu;
    bool gated = true;
    Clamp clamp = Clamp::none;
    float alpha = 1.0f;
    float limit = std::numeric_limits<float>::infinity();
    float up_shift = 0.0f;
};

// Names: `silu`, `gelu`, `gelu_tanh`, `relu`, `relu2`, `identity`; `swiglu_oai` is silu with (up + 1). A prefix `plain:` means
// no gate matrix. A finite limit clamps before the activation, with the suffix `:late` after it.
// Throws std::invalid_argument for any other name.
Gate parse_gate(const std::string& name, float alpha, float limit);

}  // namespace gangline
