// Attention of rows to keys and values that lie in pages.
//
// The work is cut into units: a tile of consecutive rows with one table x one key head x a chunk of
// keys. A unit copies blocks of 64 keys and values into panels, as weights are packed, so that both
// products are those of gemm.h; the softmax between them runs online, in fp32. Chunks begin at
// fixed keys and are merged in order: a row's result does not depend on its neighbours.
#pragma once

#include <cmath>
#include <vector>

#include "gemm.h"

constexpr int kBlockKeys = 64;
constexpr int kChunkKeys = 512;
constexpr int kTileQueries = 24;
constexpr int kMostQueries = 256;  // of one key head
#if defined(__AVX512F__)
constexpr int kAttentionPanels = 4;
#endif

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

struct Tile {
  long row, rows;
  long keys;      // the most that one of its rows sees
  long chunks;
  long partials;  // where its parts begin, in queries of all heads; used if it has many chunks
};

struct Unit {
  long tile;
  int head;
  int chunk;
};

// Which units attend; made once for all layers, by one thread.
struct AttentionPlan {
  std::vector<Tile> tiles;
  std::vector<Unit> units;
  std::vector<std::atomic<int>> missing;  // chunks of (tile, head) that are not done yet
  long partials = 0;
  std::atomic<long> next{0};

  void make(const Tables& tables, long rows, const Heads& heads) {
    tiles.clear();
    units.clear();
    partials = 0;
    const long most = std::max(1, kTileQueries / heads.group());
    for (long row = 0; row < rows;) {
      Tile tile{row, 1, tables.count[row], 1, 0};
      while (row + tile.rows < rows && tile.rows < most &&
             tables.table[row + tile.rows] == tables.table[row]) {
        tile.keys = std::max<long>(tile.keys, tables.count[row + tile.rows]);
        tile.rows++;
      }
      tile.chunks = std::max(1L, (tile.keys + kChunkKeys - 1) / kChunkKeys);
      if (tile.chunks > 1) {
        tile.partials = partials;
        partials += tile.chunks * tile.rows * heads.queries;
      }
      for (int chunk = 0; chunk < tile.chunks; chunk++)
        for (int head = 0; head < heads.keys; head++)
          units.push_back({long(tiles.size()), head, chunk});
      tiles.push_back(tile);
      row += tile.rows;
    }
    missing = std::vector<std::atomic<int>>(tiles.size() * heads.keys);
    for (size_t i = 0; i < missing.size(); i++)
      missing[i].store(int(tiles[i / heads.keys].chunks), std::memory_order_relaxed);
    next.store(0, std::memory_order_relaxed);
  }
};

// 4-byte steps of up to 16 key vectors, transposed: out[step][key].
static inline void pack_keys(const char* const* keys, long count, long steps, char* out) {
#if defined(__AVX512F__)
  for (long first = 0; first < steps; first += 16) {
    const long width = std::min(16L, steps - first);
    const __mmask16 mask = __mmask16((1u << width) - 1);
    __m512i a[16], b[16];
    for (long i = 0; i < 16; i++)
      a[i] = i < count ? _mm512_maskz_loadu_epi32(mask, keys[i] + first * 4) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
      a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
      a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
      a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
      a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (long i = 0; i < width; i++) _mm512_storeu_si512(out + (first + i) * kStepBytes, a[i]);
  }
#else
  for (long i = 0; i < kPanel; i++)
    for (long s = 0; s < steps; s++) {
      uint32_t step = 0;
      if (i < count) std::memcpy(&step, keys[i] + s * 4, 4);
      std::memcpy(out + s * kStepBytes + i * 4, &step, 4);
    }
#endif
}

// Values of the keys of one step, as weights of one panel: size <= 16 places are real.
static inline void pack_values(const float* const* values, long, long size, char* out) {
  std::memcpy(out, *values, size * 4);
  std::memset(out + size * 4, 0, kStepBytes - size * 4);
}
static inline void pack_values(const bf16* const* values, long count, long size, char* out) {
#if defined(__AVX512F__)
  if (size == kPanel) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values[0]));
    if (count > 1) {
      __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values[1]));
      low = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    _mm512_storeu_si512(out, low);
    return;
  }
#endif
  for (long i = 0; i < kPanel; i++) {
    const uint32_t low = i < size ? values[0][i].bits : 0;
    const uint32_t high = i < size && count > 1 ? values[1][i].bits : 0;
    const uint32_t pair = low | high << 16;
    std::memcpy(out + i * 4, &pair, 4);
  }
}

// rows x panels sums, for any numbers.
template <class E>
static inline void multiply_small(long rows, long panels, const char* w, long panel_bytes,
                                  const E* x, long x_stride, long steps, float* out,
                                  long out_stride) {
#if defined(__AVX512F__)
  if (panels == kAttentionPanels) {
    constexpr int most = 6;
    for (long r = 0; r < rows; r += most)
      multiply_for<E, kAttentionPanels, 0, most>(std::min<long>(most, rows - r))(
          w, panel_bytes, x + r * x_stride, x_stride, steps, out + r * out_stride, out_stride,
          nullptr);
    return;
  }
#endif
  for (long r = 0; r < rows; r += kTileRows)
    for (long p = 0; p < panels; p += kGroupPanels)
      multiply_tile<E, 0>(std::min<long>(kTileRows, rows - r),
                          std::min<long>(kGroupPanels, panels - p), w + p * panel_bytes,
                          panel_bytes, x + r * x_stride, x_stride, steps,
                          out + r * out_stride + p * kPanel, out_stride, nullptr);
}

// Memory of one thread, and the parts of tiles with many chunks.
template <class E>
struct AttentionScratch {
  static constexpr long kStepsOfBlock = kBlockKeys / Step<E>::kInputs;
  E* queries;      // (Q, K)
  E* weights;      // (Q, 64)
  float* scores;   // (Q, 64)
  float* values;   // (Q, K padded)
  float* sums;     // (Q, K padded)
  float* most;     // (Q)
  float* total;    // (Q)
  char* key_panels;
  char* value_panels;

  static long bytes(const Heads& heads) {
    AttentionScratch scratch;
    return scratch.place(nullptr, heads) - (char*)nullptr;
  }

  char* place(char* from, const Heads& heads) {
    const long queries_count = std::max(kTileQueries, heads.group());
    const long padded = heads.panels() * kPanel;
    auto take = [&](auto*& pointer, long count) {
      pointer = (decltype(+pointer))from;
      from += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(queries, queries_count * heads.size);
    take(weights, queries_count * kBlockKeys);
    take(scores, queries_count * kBlockKeys);
    take(values, queries_count * padded);
    take(sums, queries_count * padded);
    take(most, queries_count);
    take(total, queries_count);
    take(key_panels, kBlockKeys / kPanel * (heads.size / Step<E>::kInputs) * kStepBytes);
    take(value_panels, heads.panels() * kStepsOfBlock * kStepBytes);
    return from;
  }
};

// One query's softmax takes a block in: scores become weights; returns what earlier sums keep.
template <class E>
static inline float take_block(long visible, long places, float scale, const float* scores,
                               E* weights, float* most, float* total) {
  vec masked[kBlockKeys / kLanes];
  ivec lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  vec top = splat(-INFINITY);
  for (long i = 0; i < places; i += kLanes) {
    const vec score =
        choose(lane < int32_t(visible - i), load(scores + i) * scale, splat(-INFINITY));
    top = choose(score > top, score, top);
    masked[i / kLanes] = score;
  }
  const float high = std::max(*most, largest(top));
  const float base = high == -INFINITY ? 0.0f : high;
  vec added = {};
  for (long i = 0; i < places; i += kLanes) {
    const vec weight =
        choose(lane < int32_t(visible - i), exp2_of(masked[i / kLanes] - base), vec{});
    added += weight;
    put_floats(weights + i, weight);
  }
  const float keep = exp2_of(splat(*most - base))[0];
  *most = high;
  *total = *total * keep + sum(added);
  return keep;
}

// Where queries come from and results go to: (rows, H, K), rows apart by strides.
template <class E>
struct Queries {
  const float* queries;
  int64_t query_stride;
  E* out;
  int64_t out_stride;
};

// Results of chunks, before they are merged.
struct Partials {
  float* sums;  // (parts, K padded)
  float* most;
  float* total;
};

template <class E>
static inline void put_result(E* out, const float* sums, float total, int size) {
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) put_floats(out + i, load(sums + i) * factor);
  for (; i < size; i++) put(out + i, sums[i] * factor);
}

template <class E>
static void attend_unit(const Heads& heads, const Tile& tile, const Unit& unit,
                        const Pages<E>& pages, const Tables& tables, const Queries<E>& io,
                        const AttentionScratch<E>& scratch, const Partials& partials) {
  const long group = heads.group(), size = heads.size, padded = heads.panels() * kPanel;
  const long count = tile.rows * group;
  const long key_steps = size / Step<E>::kInputs;
  const long value_panel_bytes = scratch.kStepsOfBlock * kStepBytes;
  const float scale = kLog2E / std::sqrt(float(size));
  const int32_t* table = tables.tables + tables.table[tile.row] * tables.stride;
  for (long q = 0; q < count; q++) {
    const float* from = io.queries + (tile.row + q / group) * io.query_stride +
                        (unit.head * group + q % group) * size;
    long i = 0;
    for (; i + kLanes <= size; i += kLanes)
      put_floats(scratch.queries + q * size + i, load(from + i));
    for (; i < size; i++) put(scratch.queries + q * size + i, from[i]);
    scratch.most[q] = -INFINITY;
    scratch.total[q] = 0.0f;
  }
  std::memset(scratch.sums, 0, count * padded * sizeof(float));

  const long begin = long(unit.chunk) * kChunkKeys;
  const long end = std::min<long>(tile.keys, begin + kChunkKeys);
  long page = begin / pages.page_tokens, offset = begin % pages.page_tokens;
  for (long first = begin; first < end; first += kBlockKeys) {
    const long keys = std::min<long>(kBlockKeys, end - first);
    const long panels = (keys + kPanel - 1) / kPanel;
    const E* key[kBlockKeys];
    for (long i = 0; i < keys; i++) {
      key[i] = pages.key(table[page], unit.head, offset, size);
      if (++offset == pages.page_tokens) page++, offset = 0;
    }
    for (long p = 0; p < panels; p++)
      pack_keys((const char* const*)key + p * kPanel, keys - p * kPanel, key_steps,
                scratch.key_panels + p * key_steps * kStepBytes);
    multiply_small(count, panels, scratch.key_panels, key_steps * kStepBytes, scratch.queries,
                   size, key_steps, scratch.scores, kBlockKeys);
    float keep[kMostQueries];
    for (long q = 0; q < count; q++)
      keep[q] = take_block(tables.count[tile.row + q / group] - first, panels * kPanel, scale,
                           scratch.scores + q * kBlockKeys, scratch.weights + q * kBlockKeys,
                           scratch.most + q, scratch.total + q);
    const long value_steps = (keys + Step<E>::kInputs - 1) / Step<E>::kInputs;
    for (long s = 0; s < value_steps; s++) {
      const E* value[2];
      const long in_step = std::min<long>(Step<E>::kInputs, keys - s * Step<E>::kInputs);
      for (long p = 0; p < heads.panels(); p++) {
        for (long i = 0; i < in_step; i++)
          value[i] = key[s * Step<E>::kInputs + i] + pages.values_offset + p * kPanel;
        pack_values(value, in_step, std::min<long>(kPanel, size - p * kPanel),
                    scratch.value_panels + p * value_panel_bytes + s * kStepBytes);
      }
    }
    multiply_small(count, heads.panels(), scratch.value_panels, value_panel_bytes, scratch.weights,
                   kBlockKeys, value_steps, scratch.values, padded);
    for (long q = 0; q < count; q++)
      for (long i = 0; i < padded; i += kLanes) {
        float* to = scratch.sums + q * padded + i;
        store(to, load(to) * keep[q] + load(scratch.values + q * padded + i));
      }
  }

  if (tile.chunks == 1) {
    for (long q = 0; q < count; q++)
      put_result(io.out + (tile.row + q / group) * io.out_stride +
                     (unit.head * group + q % group) * size,
                 scratch.sums + q * padded, scratch.total[q], heads.size);
    return;
  }
  const long part = tile.partials + (unit.head * tile.chunks + unit.chunk) * count;
  std::memcpy(partials.sums + part * padded, scratch.sums, count * padded * sizeof(float));
  std::memcpy(partials.most + part, scratch.most, count * sizeof(float));
  std::memcpy(partials.total + part, scratch.total, count * sizeof(float));
}

// Join the chunks of a (tile, key head), in their order.
template <class E>
static void merge_chunks(const Heads& heads, const Tile& tile, int head, const Queries<E>& io,
                         const AttentionScratch<E>& scratch, const Partials& partials) {
  const long group = heads.group(), padded = heads.panels() * kPanel;
  const long count = tile.rows * group;
  for (long q = 0; q < count; q++) {
    const long first = tile.partials + head * tile.chunks * count + q;
    float high = -INFINITY, total = 0.0f;
    for (long c = 0; c < tile.chunks; c++) high = std::max(high, partials.most[first + c * count]);
    const float base = high == -INFINITY ? 0.0f : high;
    std::memset(scratch.sums, 0, padded * sizeof(float));
    for (long c = 0; c < tile.chunks; c++) {
      const long part = first + c * count;
      const float keep = exp2_of(splat(partials.most[part] - base))[0];
      total += partials.total[part] * keep;
      for (long i = 0; i < padded; i += kLanes)
        store(scratch.sums + i,
              load(scratch.sums + i) + load(partials.sums + part * padded + i) * keep);
    }
    put_result(io.out + (tile.row + q / group) * io.out_stride +
                   (head * group + q % group) * heads.size,
               scratch.sums, total, heads.size);
  }
}

// Phase: units go to whichever thread is free.
template <class E>
static void attend(AttentionPlan& plan, const Heads& heads, const Pages<E>& pages,
                   const Tables& tables, const Queries<E>& io,
                   const AttentionScratch<E>& scratch, const Partials& partials) {
  const long count = long(plan.units.size());
  for (long u; (u = plan.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
    const Unit& unit = plan.units[u];
    const Tile& tile = plan.tiles[unit.tile];
    attend_unit(heads, tile, unit, pages, tables, io, scratch, partials);
    if (tile.chunks == 1) continue;
    std::atomic<int>& missing = plan.missing[unit.tile * heads.keys + unit.head];
    if (missing.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    missing.store(int(tile.chunks), std::memory_order_relaxed);
    merge_chunks(heads, tile, unit.head, io, scratch, partials);
  }
}
