// Attention of rows to keys and values that lie in pages.
//
// The work is cut into units: a tile of consecutive rows with one table x one key head x a chunk of
// keys. A unit copies blocks of 64 keys and values into panels, as weights are packed, so that both
// products are those of gemm.h; the softmax between them runs online, in fp32. Chunks begin at
// fixed keys and are merged in order: a row's result does not depend on its neighbours.
#pragma once

#include <cmath>
#include <vector>

#include "pages.h"

constexpr int kChunkKeys = 512;
constexpr int kTileQueries = 24;
#if defined(__AVX512F__)
constexpr int kAttentionPanels = 4;
#endif

struct Tile {
  long row, rows;
  long keys;      // the most that one of its rows sees
  long chunks;
  long partials;  // where its parts begin, in queries of all heads; used if it has many chunks
};

struct Unit {
  long tile;
  int chunk;
  int head;
};

static inline const int32_t* table_of(const Tables& tables, const Tile& tile) {
  return tables.tables + tables.table[tile.row] * tables.stride;
}

// Which units attend; made once for all layers, by one thread.
struct AttentionPlan {
  std::vector<Tile> tiles;
  std::vector<Unit> units;
  std::vector<std::atomic<int>> missing;  // chunks of (tile, head) that are not done yet
  long partials = 0;

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
      tiles.push_back(tile);
      row += tile.rows;
    }
    for (size_t t = 0; t < tiles.size(); t++)
      for (int chunk = 0; chunk < tiles[t].chunks; chunk++)
        for (int head = 0; head < heads.keys; head++) units.push_back({long(t), chunk, head});
    missing = std::vector<std::atomic<int>>(tiles.size() * heads.keys);
    for (size_t i = 0; i < missing.size(); i++)
      missing[i].store(int(tiles[i / heads.keys].chunks), std::memory_order_relaxed);
  }
};

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
  float* most;     // (Q): largest score so far, in powers of 2
  float* total;    // (Q)
  float* high;     // (Q): of this block
  float* base;     // (Q)
  float* keep;     // (Q)
  char* key_panels;
  char* value_panels;

  static long bytes(const Heads& heads) {
    AttentionScratch scratch;
    return scratch.place(nullptr, heads) - (char*)nullptr;
  }

  char* place(char* from, const Heads& heads) {
    long queries_count = std::max(kTileQueries, heads.group());
    queries_count = (queries_count + kLanes - 1) / kLanes * kLanes;
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
    take(high, queries_count);
    take(base, queries_count);
    take(keep, queries_count);
    take(key_panels, kBlockKeys / kPanel * (heads.size / Step<E>::kInputs) * kStepBytes);
    take(value_panels, heads.panels() * kStepsOfBlock * kStepBytes);
    return from;
  }
};

// Softmax of all queries takes a block in: scores become weights, keep says how much of the earlier
// sums stays. A query sees the block's first visible(q) keys.
template <class E, class Visible>
static inline void take_block(long queries, long places, float scale, Visible visible,
                              const AttentionScratch<E>& scratch) {
  ivec lane;
  for (int i = 0; i < kLanes; i++) lane[i] = i;
  for (long q = 0; q < queries; q++) {
    float* scores = scratch.scores + q * kBlockKeys;
    const int32_t seen = int32_t(visible(q));
    vec top = splat(-INFINITY);
    for (long i = 0; i < places; i += kLanes) {
      vec score = load(scores + i) * scale;
      if (seen < i + kLanes) score = choose(lane < seen - int32_t(i), score, splat(-INFINITY));
      top = choose(score > top, score, top);
      store(scores + i, score);
    }
    scratch.high[q] = std::max(scratch.most[q], largest(top));
  }
  for (long q = 0; q < queries; q += kLanes) {
    const vec high = load(scratch.high + q);
    const vec base = choose(high > -INFINITY, high, vec{});
    store(scratch.keep + q, exp2_of(load(scratch.most + q) - base));
    store(scratch.base + q, base);
    store(scratch.most + q, high);
  }
  for (long q = 0; q < queries; q++) {
    const float* scores = scratch.scores + q * kBlockKeys;
    const int32_t seen = int32_t(visible(q));
    vec added = {};
    for (long i = 0; i < places; i += kLanes) {
      vec weight = exp2_of(load(scores + i) - scratch.base[q]);
      if (seen < i + kLanes) weight = choose(lane < seen - int32_t(i), weight, vec{});
      added += weight;
      put_floats(scratch.weights + q * kBlockKeys + i, weight);
    }
    scratch.total[q] = scratch.total[q] * scratch.keep[q] + sum(added);
  }
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

// blocks[0] holds the unit's first block; at the end it holds what locate_following put there.
template <class E, class Locate>
static void attend_unit(const Heads& heads, const Tile& tile, const Unit& unit,
                        const Pages<E>& pages, const Tables& tables, const Queries<E>& io,
                        const AttentionScratch<E>& scratch, const Partials& partials,
                        Block<E>* blocks, Locate locate_following) {
  const long group = heads.group(), size = heads.size, padded = heads.panels() * kPanel;
  const long count = tile.rows * group;
  const long key_steps = size / Step<E>::kInputs;
  const long value_panel_bytes = scratch.kStepsOfBlock * kStepBytes;
  const float scale = kLog2E / std::sqrt(float(size));
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
  if (begin >= end) locate_following(blocks[0]);
  for (long first = begin; first < end; first += kBlockKeys) {
    const Block<E>& block = blocks[0];
    Block<E>& coming = blocks[1];
    if (first + kBlockKeys < end)
      coming.locate(pages, table_of(tables, tile), unit.head, first + kBlockKeys, end, size);
    else
      locate_following(coming);
    const long keys = block.count;
    const long panels = (keys + kPanel - 1) / kPanel;
    for (long p = 0; p < panels; p++) {
      coming.fetch_some(p * kPanel, kPanel, 0, size);
      pack_keys((const char* const*)block.keys + p * kPanel, keys - p * kPanel, key_steps,
                scratch.key_panels + p * key_steps * kStepBytes);
    }
    multiply_small(count, panels, scratch.key_panels, key_steps * kStepBytes, scratch.queries,
                   size, key_steps, scratch.scores, kBlockKeys);
    take_block(
        count, panels * kPanel, scale,
        [&](long q) { return tables.count[tile.row + q / group] - first; }, scratch);
    const long value_steps = (keys + Step<E>::kInputs - 1) / Step<E>::kInputs;
    for (long i = 0; i < keys; i += kPanel) {
      coming.fetch_some(i, kPanel, pages.values_offset, size);
      pack_values(block.keys + i, pages.values_offset, std::min<long>(kPanel, keys - i), size,
                  value_panel_bytes, scratch.value_panels + i / Step<E>::kInputs * kStepBytes);
    }
    multiply_small(count, heads.panels(), scratch.value_panels, value_panel_bytes, scratch.weights,
                   kBlockKeys, value_steps, scratch.values, padded);
    for (long q = 0; q < count; q++)
      for (long i = 0; i < padded; i += kLanes) {
        float* to = scratch.sums + q * padded + i;
        store(to, load(to) * scratch.keep[q] + load(scratch.values + q * padded + i));
      }
    std::swap(blocks[0], blocks[1]);
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

// Phase: all units of a plan.
template <class E>
static void attend(const Team& team, AttentionPlan& plan, const Heads& heads,
                   const Pages<E>& pages, const Tables& tables, const Queries<E>& io,
                   const AttentionScratch<E>& scratch, const Partials& partials) {
  const long count = long(plan.units.size());
  auto locate_first = [&](long u, Block<E>& block) {
    block.count = 0;
    if (u >= count) return;
    const Unit& unit = plan.units[u];
    const Tile& tile = plan.tiles[unit.tile];
    block.locate(pages, table_of(tables, tile), unit.head, long(unit.chunk) * kChunkKeys,
                 tile.keys, heads.size);
  };
  Block<E> blocks[2];
  bool is_first = true;
  team.take_jobs(count, [&](long u, long following) {
    if (is_first) locate_first(u, blocks[0]);
    is_first = false;
    const Unit& unit = plan.units[u];
    const Tile& tile = plan.tiles[unit.tile];
    attend_unit(heads, tile, unit, pages, tables, io, scratch, partials, blocks,
                [&](Block<E>& block) { locate_first(following, block); });
    if (tile.chunks == 1) return;
    std::atomic<int>& missing = plan.missing[unit.tile * heads.keys + unit.head];
    if (missing.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    missing.store(int(tile.chunks), std::memory_order_relaxed);
    merge_chunks(heads, tile, unit.head, io, scratch, partials);
  });
}
