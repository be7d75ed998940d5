// Products of rows with packed weights: y = x W^T, summed in fp32.
//
// Weights lie in panels of 16 outputs; a panel holds, step by step, 16 x 4 bytes: one input of each
// output in fp32, a pair of inputs in bf16. One sum per output runs over the inputs in order, so a
// row's result depends neither on the other rows nor on the number of threads.
#pragma once

#include <algorithm>

#include "threads.h"
#include "vector.h"

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
constexpr int kBlockPanels = 3;  // 8 x 3 sums, 3 weights, 1 input: 28 of 32 registers
constexpr int kWideRows = 4;     // so few rows need more panels to keep the adders busy
#else
constexpr int kTileRows = 4;  // at most 16 registers
constexpr int kBlockPanels = 1;
constexpr int kWideRows = 0;
#endif
constexpr int kGroupPanels = 2 * kBlockPanels;  // even: gate and up panels come in pairs
constexpr int kStepBytes = 4 * kPanel;
constexpr long kChunkBytes = 256 << 10;  // inputs that a pass over the weights keeps in L2

struct Weight {
  const char* data;
  int64_t steps;   // per panel
  int64_t panels;
  int64_t outputs; // real ones; the last panel is padded with zeros
};

static inline const char* panel_at(const Weight& weight, long panel) {
  return weight.data + panel * weight.steps * kStepBytes;
}

// ROWS x PANELS sums to tile[row][panel * 16 + i]; FETCH lines of coming weights are asked for
// in every step, since the processor does not see the next panels coming.
template <class E, int ROWS, int PANELS, int FETCH>
static void multiply(const char* w, long panel_bytes, const E* x, long x_stride, long steps,
                     float* tile, long tile_stride, const char* coming) {
  vec sums[ROWS][PANELS][kPanelVectors] = {};
  for (long s = 0; s < steps; s++) {
    for (int f = 0; f < FETCH; f++) fetch(coming + f * kStepBytes);
    coming += FETCH * kStepBytes;
    typename Step<E>::Weights weights[PANELS][kPanelVectors];
    for (int p = 0; p < PANELS; p++)
      for (int v = 0; v < kPanelVectors; v++)
        weights[p][v] = Step<E>::weights(w + p * panel_bytes + v * sizeof(vec));
    for (int r = 0; r < ROWS; r++) {
      auto inputs = Step<E>::inputs(x + r * x_stride);
      for (int p = 0; p < PANELS; p++)
        for (int v = 0; v < kPanelVectors; v++)
          sums[r][p][v] = Step<E>::add_product(sums[r][p][v], inputs, weights[p][v]);
    }
    w += kStepBytes;
    x += Step<E>::kInputs;
  }
  for (int r = 0; r < ROWS; r++)
    for (int p = 0; p < PANELS; p++)
      for (int v = 0; v < kPanelVectors; v++)
        store(tile + r * tile_stride + p * kPanel + v * kLanes, sums[r][p][v]);
}

template <class E>
using Multiply = void (*)(const char*, long, const E*, long, long, float*, long, const char*);

// The same for rows that are known when it runs.
template <class E, int PANELS, int FETCH, int MOST_ROWS, int ROWS = 1>
static inline Multiply<E> multiply_for(long rows) {
  if constexpr (ROWS < MOST_ROWS) {
    if (rows > ROWS) return multiply_for<E, PANELS, FETCH, MOST_ROWS, ROWS + 1>(rows);
  }
  return multiply<E, ROWS, PANELS, FETCH>;
}

template <class E, int FETCH>
static inline void multiply_tile(long rows, long panels, const char* w, long panel_bytes,
                                 const E* x, long x_stride, long steps, float* tile,
                                 long tile_stride, const char* coming) {
  for (long p = 0; p < panels;) {
    Multiply<E> kernel = multiply_for<E, 1, 0, kTileRows>(rows);
    long width = 1;
    if constexpr (kBlockPanels > 1) {
      const long left = panels - p;
      if (left == kGroupPanels && rows <= kWideRows) {
        kernel = multiply_for<E, kGroupPanels, 0, kWideRows>(rows);
        width = kGroupPanels;
      } else if (left >= kBlockPanels) {
        kernel = multiply_for<E, kBlockPanels, FETCH, kTileRows>(rows);
        width = kBlockPanels;
      } else if (left == 2) {
        kernel = multiply_for<E, 2, 0, kTileRows>(rows);
        width = 2;
      }
    }
    kernel(w + p * panel_bytes, panel_bytes, x, x_stride, steps, tile + p * kPanel, tile_stride,
           coming);
    coming += width / kBlockPanels * FETCH * steps * kStepBytes;
    p += width;
  }
}

// Low-rank addition of one recursion: its inputs and the weights that take them.
template <class E>
struct Addition {
  const Weight* weight = nullptr;
  const E* x = nullptr;
  long x_stride = 0;
};

// Rows [rows.begin, rows.end) of x times panels [panels.begin, panels.end), an even number to begin
// with. finish(row, rows, panel, panels, tile, stride) gets every finished tile.
template <class E, class Finish>
static void gemm(const Team& team, const Weight& weight, Range panels, Range rows, const E* x,
                 long x_stride, Finish finish, Addition<E> addition = {}) {
  const long count = rows.end - rows.begin;
  const long groups = (panels.end - panels.begin + kGroupPanels - 1) / kGroupPanels;
  if (count <= 0 || groups <= 0) return;
  const long panel_bytes = weight.steps * kStepBytes;
  const long most = std::max<long>(kTileRows, kChunkBytes / (weight.steps * 4));
  const long chunks = (count + most - 1) / most;
  constexpr long stride = kGroupPanels * kPanel;
  alignas(64) float tile[kTileRows * stride];
  alignas(64) float added[kTileRows * stride];
  auto first_panel = [&](long job) { return panels.begin + job % groups * kGroupPanels; };

  team.take_jobs(chunks * groups, [&](long job, long following) {
    const long p = first_panel(job);
    const long width = std::min<long>(kGroupPanels, panels.end - p);
    const char* w = panel_at(weight, p);
    const char* coming =
        following < chunks * groups ? panel_at(weight, first_panel(following)) : w;
    const long begin = rows.begin + count * (job / groups) / chunks;
    const long in_chunk = rows.begin + count * (job / groups + 1) / chunks - begin;
    const long tiles = (in_chunk + kTileRows - 1) / kTileRows;
    for (long t = 0; t < tiles; t++) {
      const long row = begin + in_chunk * t / tiles;
      const long height = begin + in_chunk * (t + 1) / tiles - row;
      // The first tiles fetch the next group of panels, about once.
      const auto multiply_rows = tiles == 1   ? multiply_tile<E, kBlockPanels>
                                 : tiles == 2 ? multiply_tile<E, 2>
                                 : t < 3      ? multiply_tile<E, 1>
                                              : multiply_tile<E, 0>;
      multiply_rows(height, width, w, panel_bytes, x + row * x_stride, x_stride, weight.steps,
                    tile, stride, coming + t * kGroupPanels / std::min(tiles, 3L) * panel_bytes);
      if (addition.weight) {
        const Weight& low = *addition.weight;
        multiply_tile<E, 0>(height, width, panel_at(low, p), low.steps * kStepBytes,
                            addition.x + row * addition.x_stride, addition.x_stride, low.steps,
                            added, stride, nullptr);
        for (long i = 0; i < height * stride; i += kLanes)
          store(tile + i, load(tile + i) + load(added + i));
      }
      finish(row, height, p, width, tile, stride);
    }
  });
}

// What becomes of finished sums: stored, as fp32 or bf16.
template <class Out>
struct Assign {
  Out* out;
  long out_stride;
  long outputs;

  void operator()(long row, long rows, long panel, long panels, const float* tile,
                  long stride) const {
    const long first = panel * kPanel;
    const long width = std::min(panels * kPanel, outputs - first);
    for (long r = 0; r < rows; r++) {
      Out* to = out + (row + r) * out_stride + first;
      const float* from = tile + r * stride;
      long i = 0;
      for (; i + kLanes <= width; i += kLanes) put_floats(to + i, load(from + i));
      for (; i < width; i++) put(to + i, from[i]);
    }
  }
};

// Added to the residual stream.
struct Accumulate {
  float* out;
  long out_stride;
  long outputs;

  void operator()(long row, long rows, long panel, long panels, const float* tile,
                  long stride) const {
    const long first = panel * kPanel;
    const long width = std::min(panels * kPanel, outputs - first);
    for (long r = 0; r < rows; r++) {
      float* to = out + (row + r) * out_stride + first;
      const float* from = tile + r * stride;
      long i = 0;
      for (; i + kLanes <= width; i += kLanes) store(to + i, load(to + i) + load(from + i));
      for (; i < width; i++) to[i] += from[i];
    }
  }
};

// silu(gate) * up, of panels that come in turns: gate, up, gate, up.
template <class E>
struct Gated {
  E* out;
  long out_stride;

  void operator()(long row, long rows, long panel, long panels, const float* tile,
                  long stride) const {
    for (long r = 0; r < rows; r++) {
      E* to = out + (row + r) * out_stride + panel / 2 * kPanel;
      const float* from = tile + r * stride;
      for (long p = 0; p < panels; p += 2, from += 2 * kPanel, to += kPanel)
        for (long i = 0; i < kPanel; i += kLanes)
          put_floats(to + i, silu(load(from + i)) * load(from + kPanel + i));
    }
  }
};
