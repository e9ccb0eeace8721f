// h = act(gate) (up + shift), in fp32; the formulas are those of the CPU core.
#pragma once

#include <ptx.cuh>

namespace gate {

enum Activation : i32 { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, IDENTITY = 5, SWIGLU_OAI = 6 };

struct Form {
  float alpha;  // slope of silu's sigmoid
  float limit;  // of gate (from above) and up (both sides); infinity if there is none
  i32 late;     // whether the gate is limited after its activation
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <i32 ACTIVATION>
__device__ inline float activate(const Form& form, float x) {
  switch (ACTIVATION) {
    case GELU: return 0.5f * x * erfcf(x * -0.70710678f);
    case GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case RELU: return fmaxf(x, 0.0f);
    case RELU2: return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);
    case IDENTITY: return x;
    default: return x * sigmoid(form.alpha * x);
  }
}

template <i32 ACTIVATION>
__device__ inline float apply(const Form& form, float gate, float up) {
  const float bounded = form.late ? gate : fminf(gate, form.limit);
  float active = activate<ACTIVATION>(form, bounded);
  if (form.late) active = fminf(active, form.limit);
  const float shift = ACTIVATION == SWIGLU_OAI ? 1.0f : 0.0f;
  return active * (fminf(fmaxf(up, -form.limit), form.limit) + shift);
}

}  // namespace gate
