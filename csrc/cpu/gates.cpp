#include "gates.hpp"

#include <cmath>
#include <map>
#include <stdexcept>

namespace gangline {
namespace {

bool take_prefix(std::string& text, const std::string& prefix) {
    if (text.rfind(prefix, 0) != 0) return false;
    text.erase(0, prefix.size());
    return true;
}

bool take_suffix(std::string& text, const std::string& suffix) {
    if (text.size() < suffix.size() || text.compare(text.size() - suffix.size(), suffix.size(), suffix) != 0) return false;
    text.erase(text.size() - suffix.size());
    return true;
}

}  // namespace

Gate parse_gate(const std::string& name, float alpha, float limit) {
    static const std::map<std::string, Activation> activations{
        {"identity", Activation::identity}, {"silu", Activation::silu}, {"gelu", Activation::gelu},
        {"gelu_tanh", Activation::gelu_tanh}, {"relu", Activation::relu}, {"relu2", Activation::relu2},
        {"swiglu_oai", Activation::silu},
    };
    std::string rest = name;
    Gate gate;
    gate.gated = !take_prefix(rest, "plain:");
    gate.alpha = alpha;
    gate.limit = limit;
    const bool late = take_suffix(rest, ":late");
    if (std::isfinite(limit)) gate.clamp = late ? Clamp::after : Clamp::before;
    if (rest == "swiglu_oai") gate.up_shift = 1.0f;
    const auto found = activations.find(rest);
    if (found == activations.end()) throw std::invalid_argument("the native core does not know the gate '" + name + "'");
    if (!(limit > 0.0f)) throw std::invalid_argument("a gate's limit must be positive; infinity means none");
    gate.activation = found->second;
    return gate;
}

}  // namespace gangline
