// The arithmetic of attention.hpp, in loops of sixteen lanes that a compiler turns into whatever vectors its flags allow.
// Included once by each attention_*.cpp, inside an anonymous namespace, after the standard headers: nothing compiled
// under wide flags may be shared with other files.

constexpr int kLanes = 16;

inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float widen(float x) { return x; }

struct Bf16 {
    std::uint16_t bits;
};
struct F16 {
    std::uint16_t bits;
};

inline float widen(Bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, sizeof y);
    return y;
}

inline float widen(F16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
    std::uint32_t bits = static_cast<std::uint32_t>(x.bits & 0x7FFFU) << 13;
    const std::uint32_t scale_bits = (127U + 112U) << 23;
    float value, scale;
    __builtin_memcpy(&value, &bits, sizeof value);
    __builtin_memcpy(&scale, &scale_bits, sizeof scale);
    value *= scale;  // also makes subnormals normal; what was infinite lands at 2^16 and above
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits |= (bits >= 0x47800000U) ? 0x7F800000U : 0U;
    bits |= sign;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// exp(x) for x <= 0 with an error of two units in the last place; 0 below the normal numbers.
inline float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = fused(clamped, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693145751953125f) - n * 1.428606765330187e-6f;
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, r * r, r) + 1.0f;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000U;
    float power;
    __builtin_memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

template <class T>
inline const float* widened(const T* source, int n, float* room) {
    for (int i = 0; i < n; ++i) room[i] = widen(source[i]);
    return room;
}
inline const float* widened(const float* source, int, float*) { return source; }

inline float dot(const float* a, const float* b, int n) {
    float lane[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lane[l] = fused(a[i + l], b[i + l], lane[l]);
    for (; i < n; ++i) lane[i % kLanes] = fused(a[i], b[i], lane[i % kLanes]);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
}

template <class T>
void score_keys(const AttentionChunk& c) {
    const T* keys = static_cast<const T*>(c.keys);
    for (int p = 0; p < c.positions; ++p) {
        const float* key = widened(keys + static_cast<std::ptrdiff_t>(p) * c.head_dim, c.head_dim, c.rows);
        for (int g = 0; g < c.group; ++g)
            c.scores[g * kAttentionChunk + p] = dot(c.q + static_cast<std::ptrdiff_t>(g) * c.head_dim, key, c.head_dim) * c.scaling;
    }
}

inline float largest(const float* s, int n) {
    float lane[kLanes];
    for (int l = 0; l < kLanes; ++l) lane[l] = s[0];
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lane[l] = s[i + l] > lane[l] ? s[i + l] : lane[l];
    for (; i < n; ++i) lane[0] = s[i] > lane[0] ? s[i] : lane[0];
    float top = lane[0];
    for (int l = 1; l < kLanes; ++l) top = lane[l] > top ? lane[l] : top;
    return top;
}

// Turns scores into exp(score - max); fills in max and sum.
inline void weigh(const AttentionChunk& c) {
    for (int g = 0; g < c.group; ++g) {
        float* s = c.scores + g * kAttentionChunk;
        const float top = largest(s, c.positions);
        float lane[kLanes] = {};
        int p = 0;
        for (; p + kLanes <= c.positions; p += kLanes)
            for (int l = 0; l < kLanes; ++l) {
                s[p + l] = exp_nonpositive(s[p + l] - top);
                lane[l] += s[p + l];
            }
        for (; p < c.positions; ++p) {
            s[p] = exp_nonpositive(s[p] - top);
            lane[p % kLanes] += s[p];
        }
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
        c.max[g] = top;
        c.sum[g] = lane[0];
    }
}

template <class T>
void sum_values(const AttentionChunk& c) {
    const T* values = static_cast<const T*>(c.values);
    const int n = c.head_dim;
    for (int i = 0; i < c.group * n; ++i) c.acc[i] = 0.0f;
    int p = 0;
    for (; p + 4 <= c.positions; p += 4) {  // four rows at a time: the sums are read and written once for them
        const float* v[4];
        for (int j = 0; j < 4; ++j)
            v[j] = widened(values + static_cast<std::ptrdiff_t>(p + j) * n, n, c.rows + static_cast<std::ptrdiff_t>(j) * n);
        for (int g = 0; g < c.group; ++g) {
            const float* s = c.scores + g * kAttentionChunk + p;
            const float a = s[0], b = s[1], d = s[2], e = s[3];
            const float *va = v[0], *vb = v[1], *vd = v[2], *ve = v[3];
            float* __restrict acc = c.acc + static_cast<std::ptrdiff_t>(g) * n;
            for (int i = 0; i < n; ++i) acc[i] = fused(e, ve[i], fused(d, vd[i], fused(b, vb[i], fused(a, va[i], acc[i]))));
        }
    }
    for (; p < c.positions; ++p) {
        const float* v = widened(values + static_cast<std::ptrdiff_t>(p) * n, n, c.rows);
        for (int g = 0; g < c.group; ++g) {
            const float w = c.scores[g * kAttentionChunk + p];
            float* __restrict acc = c.acc + static_cast<std::ptrdiff_t>(g) * n;
            for (int i = 0; i < n; ++i) acc[i] = fused(w, v[i], acc[i]);
        }
    }
}

template <class T>
void attend_as(const AttentionChunk& c) {
    score_keys<T>(c);
    weigh(c);
    sum_values<T>(c);
}

void attend(const AttentionChunk& c) {
    switch (c.format) {
        case Format::bf16: return attend_as<Bf16>(c);
        case Format::f16: return attend_as<F16>(c);
        default: return attend_as<float>(c);
    }
}

constexpr AttentionKernels kTable{attend};
