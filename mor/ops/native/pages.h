// Keys and values in pages, and how they become panels, as weights are packed.
#pragma once

#include "gemm.h"

constexpr int kBlockKeys = 64;

struct Heads {
  int queries;  // H
  int keys;     // G
  int size;     // K
  int group() const { return queries / keys; }
  int panels() const { return (size + kPanel - 1) / kPanel; }
};

// Pages of one layer: keys (pages, G, P, K) and values beside them.
template <class E>
struct Pages {
  E* keys;
  int64_t page_stride;
  int64_t values_offset;
  int64_t page_tokens;  // P

  E* key(long page, long head, long offset, int size) const {
    return keys + page * page_stride + (head * page_tokens + offset) * size;
  }
};

struct Tables {
  const int32_t* tables;
  int64_t stride;
  const int32_t* table;  // of a row
  const int32_t* count;  // of a row
};

// Keys of a block, by address, and those that come after it: they lie in small pieces, which the
// processor does not see coming, so they are fetched while this block is worked on.
template <class E>
struct Block {
  const E* keys[kBlockKeys];
  long count = 0;

  void locate(const Pages<E>& pages, const int32_t* table, long head, long first, long end,
              int size) {
    count = std::min<long>(kBlockKeys, end - first);
    long page = first / pages.page_tokens, offset = first % pages.page_tokens;
    for (long i = 0; i < count; page++, offset = 0) {
      const E* key = pages.key(table[page], head, offset, size);
      const long until = std::min<long>(count, i + pages.page_tokens - offset);
      for (; i < until; i++, key += size) keys[i] = key;
    }
  }

  void fetch_some(long first, long keys_count, int64_t offset, long size) const {
    const long last = std::min(count, first + keys_count);
    for (long i = first; i < last; i++)
      for (long at = 0; at < size; at += 64 / long(sizeof(E))) fetch(keys[i] + offset + at);
  }
};

// 4-byte steps of up to 16 key vectors, transposed: out[step][key]. Places without a key repeat the
// first one; their scores are not looked at.
static inline void pack_keys(const char* const* keys, long count, long steps, char* out) {
  const char* key[kPanel];
  for (long i = 0; i < kPanel; i++) key[i] = keys[i < count ? i : 0];
  long s = 0;
#if defined(__AVX512F__)
  for (; s + 4 <= steps; s += 4, out += 4 * kStepBytes) {
    __m512i a[4];  // a[i]: four steps of keys i, 4 + i, 8 + i and 12 + i
    for (int i = 0; i < 4; i++) {
      auto four = [&](int k) { return _mm_loadu_si128((const __m128i*)(key[k] + s * 4)); };
      a[i] = _mm512_castsi128_si512(four(i));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, four(4 + i));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, four(8 + i));
      a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, four(12 + i));
    }
    const __m512i low01 = _mm512_unpacklo_epi32(a[0], a[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(a[0], a[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(a[2], a[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(out + kStepBytes, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(out + 2 * kStepBytes, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(out + 3 * kStepBytes, _mm512_unpackhi_epi64(high01, high23));
  }
#endif
  for (; s < steps; s++, out += kStepBytes)
    for (long i = 0; i < kPanel; i++) std::memcpy(out + i * 4, key[i] + s * 4, 4);
}

// Values beside keys, as weights: panels of 16 places, in steps of one or two keys.
static inline void pack_values(const float* const* at, int64_t offset, long keys, long size,
                               long panel_bytes, char* out) {
  for (long key = 0; key < keys; key++, out += kStepBytes)
    for (long first = 0, panel = 0; first < size; first += kPanel, panel++) {
      const long width = std::min<long>(kPanel, size - first);
      char* to = out + panel * panel_bytes;
      std::memcpy(to, at[key] + offset + first, width * 4);
      std::memset(to + width * 4, 0, kStepBytes - width * 4);
    }
}

static inline void pack_values(const bf16* const* at, int64_t offset, long keys, long size,
                               long panel_bytes, char* out) {
#if defined(__AVX512BW__)
  const __m512i low_places =
      _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                       37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high_places = _mm512_add_epi16(low_places, _mm512_set1_epi16(16));
#endif
  for (long key = 0; key < keys; key += 2, out += kStepBytes) {
    const bool is_pair = key + 1 < keys;
    const bf16* one = at[key] + offset;
    const bf16* other = at[key + is_pair] + offset;
    char* to = out;
    long first = 0;
#if defined(__AVX512BW__)
    const __mmask32 pair = is_pair ? 0xffffffff : 0;
    for (; first + 2 * kPanel <= size; first += 2 * kPanel, to += 2 * panel_bytes) {
      const __m512i a = _mm512_loadu_si512(one + first);
      const __m512i b = _mm512_maskz_loadu_epi16(pair, other + first);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low_places, b));
      _mm512_storeu_si512(to + panel_bytes, _mm512_permutex2var_epi16(a, high_places, b));
    }
#endif
    for (; first < size; first += kPanel, to += panel_bytes)
      for (long i = 0; i < kPanel; i++) {
        const bool is_real = first + i < size;
        const uint32_t low = is_real ? one[first + i].bits : 0;
        const uint32_t high = is_real && is_pair ? other[first + i].bits : 0;
        const uint32_t both = low | high << 16;
        std::memcpy(to + i * 4, &both, 4);
      }
  }
}
