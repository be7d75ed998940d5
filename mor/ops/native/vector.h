// Vectors of the machine's own width, bf16, and exp: the only place that knows instruction sets.
//
// A panel of weights is 16 outputs wide on every machine; it is kPanel / kLanes vectors here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kLanes = 16;
#elif defined(__AVX__)
#include <immintrin.h>
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPanel = 16;
constexpr int kPanelVectors = kPanel / kLanes;

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

template <class V = vec>
static inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
static inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Bring a line into the second cache. GCC drops functions that do nothing else, hence the asm.
static inline void fetch(const void* from) {
  __builtin_prefetch(from, 0, 2);
  asm volatile("");
}

static inline vec splat(float value) { return value - vec{}; }

static inline vec choose(ivec where, vec yes, vec no) {
  return where ? yes : no;
}

static inline float to_float(float value) { return value; }
static inline float to_float(bf16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

// Round to nearest even; a NaN stays one.
static inline uint32_t bf16_bits(float value) {
  uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void put(float* to, float value) { *to = value; }
static inline void put(bf16* to, float value) { to->bits = uint16_t(bf16_bits(value)); }

static inline vec load_floats(const float* from) { return load(from); }
static inline void put_floats(float* to, vec v) { store(to, v); }

static inline vec load_floats(const bf16* from) {
#if defined(__AVX512F__)
  __m256i half = _mm256_loadu_si256((const __m256i*)from);
  return (vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  vec v;
  for (int i = 0; i < kLanes; i++) v[i] = to_float(from[i]);
  return v;
#endif
}

static inline void put_floats(bf16* to, vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  uvec bits = bits_as<uvec>(v);
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  ivec is_nan = v != v;
  uvec out = (uvec(is_nan) & ((bits >> 16) | 0x40)) | (~uvec(is_nan) & rounded);
  for (int i = 0; i < kLanes; i++) to[i].bits = uint16_t(out[i]);
#endif
}

static inline float sum(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

static inline float largest(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// 2^x to about 2 units in the last place; NaN stays NaN, below -126 it is 2^-126, exp2(0) is 1.
static inline vec exp2_of(vec x) {
  x = choose(x < -126.0f, splat(-126.0f), x);
  x = choose(x > 127.0f, splat(127.0f), x);
  const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vec shifted = x + magic;
  vec rest = x - (shifted - magic);
  ivec exponent = bits_as<ivec>(shifted) - bits_as<ivec>(magic);
  vec p = rest * 1.5403530e-4f + 1.3333558e-3f;
  p = p * rest + 9.6181291e-3f;
  p = p * rest + 5.5504109e-2f;
  p = p * rest + 2.4022651e-1f;
  p = p * rest + 6.9314718e-1f;
  p = p * rest + 1.0f;
  return p * bits_as<vec>((exponent + 127) << 23);
}

constexpr float kLog2E = 1.44269504088896340736f;

static inline vec silu(vec x) { return x / (1.0f + exp2_of(x * -kLog2E)); }

// One step of a dot product with a panel: a bf16 step is a pair of inputs, an fp32 step is one.
template <class E>
struct Step;

template <>
struct Step<float> {
  static constexpr int kInputs = 1;
  typedef vec Inputs;
  typedef vec Weights;
  static inline Inputs inputs(const float* x) { return splat(*x); }
  static inline Weights weights(const char* w) { return load(w); }
  static inline vec add_product(vec sum, Inputs x, Weights w) { return sum + x * w; }
};

template <>
struct Step<bf16> {
  static constexpr int kInputs = 2;
#if defined(__AVX512BF16__)
  typedef __m512bh Inputs;
  typedef __m512bh Weights;
  static inline Inputs inputs(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static inline Weights weights(const char* w) {
    return (__m512bh)_mm512_loadu_si512((const void*)w);
  }
  static inline vec add_product(vec sum, Inputs x, Weights w) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, x, w);
  }
#else
  struct Inputs {
    vec low, high;
  };
  struct Weights {
    vec low, high;
  };
  static inline Inputs inputs(const bf16* x) {
    return {splat(to_float(x[0])), splat(to_float(x[1]))};
  }
  static inline Weights weights(const char* w) {
    uvec pair = load<uvec>(w);
    return {bits_as<vec>(pair << 16), bits_as<vec>(pair & 0xffff0000u)};
  }
  static inline vec add_product(vec sum, Inputs x, Weights w) {
    return (sum + x.low * w.low) + x.high * w.high;
  }
#endif
};
