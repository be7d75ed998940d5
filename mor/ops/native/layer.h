// Whole Llama layers in one call: phases of a team, with a barrier after each.
#pragma once

#include "attention.h"

struct Projection {
  Weight weight;
  // Low-rank additions, one pair a recursion; both null where there are none. The scale is in b.
  const Weight* a;
  const Weight* b;
};

struct Layer {
  Projection qkv;      // q, padded to a panel, then k and v
  Projection out;
  Projection gate_up;  // panels in turns
  Projection down;
  const float* attention_gain;  // (D) or (R, D)
  const float* mlp_gain;
  int64_t gain_stride;  // D where every recursion has its own, else 0
  const float* bias;    // of qkv's outputs, in their places, the padding of q too; null without
  const float* q_gain;  // (K), of each head's norm; null without
  const float* k_gain;
};

struct Group {
  const Layer* layers;
  const float* cos;  // (context, K / 2)
  const float* sin;
  int64_t count;
  int64_t width;
  int64_t recursions;
  int64_t low_rank;  // widest of the additions, padded to a panel
  int32_t query_heads, key_heads, head_size;
  int32_t is_bf16;
  float eps;
};

struct Rows {
  const int32_t* position;
  const int32_t* recursion;
  const int32_t* table;
  const int32_t* count;
  const int64_t* slot;
  const int32_t* tables;
  const int32_t* recursion_starts;  // (R + 1), null without low-rank additions
  void* pool;
  int64_t rows;
  int64_t kv_rows;    // rows from here on make no keys and values
  int64_t full_rows;  // rows from here on need only keys and values of the last layer
  int64_t tables_stride;
  int64_t page_stride;   // in elements
  int64_t layer_stride;  // in elements
  int64_t page_tokens;
  int64_t first_layer;
};

// One block of memory that grows; each calling thread keeps its own.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }

  // Null if there is no memory left.
  char* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      memory_ = (char*)std::malloc(bytes + 64);
      if (!memory_) return nullptr;
      size_ = bytes;
    }
    return memory_ + (64 - (uintptr_t)memory_ % 64) % 64;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

template <class E>
static inline long row_places(const Weight& weight) {
  return weight.steps * Step<E>::kInputs;
}

// Root-mean-square norm of one row; places from width to padded become zero.
template <class E>
static inline void norm_row(const float* x, const float* gain, long width, float eps, E* out,
                            long padded) {
  vec squares = {};
  long i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const vec value = load(x + i);
    squares += value * value;
  }
  float square = sum(squares);
  for (; i < width; i++) square += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(square / float(width) + eps);
  for (i = 0; i + kLanes <= width; i += kLanes)
    put_floats(out + i, load(x + i) * factor * load(gain + i));
  for (; i < width; i++) put(out + i, x[i] * factor * gain[i]);
  for (; i < padded; i++) put(out + i, 0.0f);
}

// Turn one head by its row's angles, half-split; out may be x.
template <class Out>
static inline void rotate_head(const float* x, const float* cos, const float* sin, long half,
                               Out* out) {
  long i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vec low = load(x + i), high = load(x + half + i);
    const vec c = load(cos + i), s = load(sin + i);
    put_floats(out + i, low * c - high * s);
    put_floats(out + half + i, high * c + low * s);
  }
  for (; i < half; i++) {
    const float low = x[i], high = x[half + i];
    put(out + i, low * cos[i] - high * sin[i]);
    put(out + half + i, high * cos[i] + low * sin[i]);
  }
}

template <class E>
static inline void copy_head(const float* x, long size, E* out) {
  long i = 0;
  for (; i + kLanes <= size; i += kLanes) put_floats(out + i, load(x + i));
  for (; i < size; i++) put(out + i, x[i]);
}

template <class E>
class LayerCall {
 public:
  LayerCall(const Group& group, const Rows& rows, float* x, int threads)
      : group_(group), rows_(rows), x_(x), threads_(threads),
        heads_{group.query_heads, group.key_heads, group.head_size} {}

  bool run(Workspace& workspace) {
    const Tables tables{rows_.tables, rows_.tables_stride, rows_.table, rows_.count};
    static thread_local AttentionPlan all_rows, full_rows;
    plan_ = &all_rows;
    last_plan_ = rows_.full_rows < rows_.rows ? &full_rows : &all_rows;
    const bool is_only_last = group_.count == 1 && last_plan_ != plan_;
    if (!is_only_last) plan_->make(tables, rows_.rows, heads_);
    if (last_plan_ != plan_) last_plan_->make(tables, rows_.full_rows, heads_);
    tables_ = tables;
    if (!reserve(workspace)) return false;
    run_team(threads_, [this](const Team& team) {
      for (long l = 0; l < group_.count; l++) layer(team, l);
    });
    return true;
  }

 private:
  bool reserve(Workspace& workspace) {
    const Layer& layer = group_.layers[0];
    const long rows = rows_.rows, padded = heads_.panels() * kPanel;
    normed_stride_ = row_places<E>(layer.qkv.weight);
    qkv_stride_ = layer.qkv.weight.panels * kPanel;
    attended_stride_ = row_places<E>(layer.out.weight);
    gated_stride_ = layer.gate_up.weight.panels / 2 * kPanel;
    const long parts = std::max(plan_->partials, last_plan_->partials);
    const long scratch_bytes = AttentionScratch<E>::bytes(heads_);
    char* base = nullptr;
    char* at = nullptr;
    auto take = [&](auto*& pointer, long count) {
      pointer = (decltype(+pointer))at;
      at += (count * long(sizeof(*pointer)) + 63) / 64 * 64;
    };
    for (int pass = 0; pass < 2; pass++) {
      at = base;
      take(normed_, rows * normed_stride_);
      take(qkv_, rows * qkv_stride_);
      take(attended_, rows * attended_stride_);
      take(gated_, rows * gated_stride_);
      take(low_, rows * group_.low_rank);
      take(partials_.sums, parts * padded);
      take(partials_.most, parts);
      take(partials_.total, parts);
      take(scratch_, threads_ * scratch_bytes);
      if (pass == 0 && !(base = workspace.reserve(at - base))) return false;
    }
    return true;
  }

  void layer(const Team& team, long l) {
    const Layer& layer = group_.layers[l];
    const bool is_last = l == group_.count - 1;
    const long rows = is_last ? rows_.full_rows : rows_.rows;
    const long kv_rows = rows_.kv_rows;
    const long width = group_.width;
    AttentionPlan& plan = is_last ? *last_plan_ : *plan_;

    norm(team, layer.attention_gain, layer.gain_stride, std::max(rows, kv_rows));
    team.wait();
    const long q_panels = (long(heads_.queries) * heads_.size + kPanel - 1) / kPanel;
    const Assign<float> to_qkv{qkv_, qkv_stride_, qkv_stride_};
    const Weight& qkv = layer.qkv.weight;
    project(team, layer.qkv, std::max(rows, kv_rows), normed_, normed_stride_,
            [&](Range slice, Addition<E> low) {
              gemm(team, qkv, {0, q_panels}, below(slice, rows), normed_, normed_stride_, to_qkv,
                   low);
              gemm(team, qkv, {q_panels, long(qkv.panels)}, below(slice, kv_rows), normed_,
                   normed_stride_, to_qkv, low);
            });
    team.wait();
    const Pages<E> pages = pages_of(l);
    rotate_and_store(team, layer, pages, q_panels * kPanel, rows, kv_rows);
    team.wait();
    if (rows > 0) {
      AttentionScratch<E> scratch;
      scratch.place(scratch_ + team.thread * AttentionScratch<E>::bytes(heads_), heads_);
      attend(team, plan, heads_, pages, tables_,
             Queries<E>{qkv_, qkv_stride_, attended_, attended_stride_}, scratch, partials_);
    }
    team.wait();
    project_all(team, layer.out, rows, attended_, attended_stride_,
                Accumulate{x_, width, width});
    team.wait();
    norm(team, layer.mlp_gain, layer.gain_stride, rows);
    team.wait();
    project_all(team, layer.gate_up, rows, normed_, normed_stride_,
                Gated<E>{gated_, gated_stride_});
    team.wait();
    project_all(team, layer.down, rows, gated_, gated_stride_, Accumulate{x_, width, width});
    team.wait();
  }

  static Range below(Range slice, long rows) {
    return {std::min(slice.begin, rows), std::min(slice.end, rows)};
  }

  // Call product(rows, addition) for all rows at once, or for those of each recursion.
  template <class Product>
  void project(const Team& team, const Projection& projection, long rows, const E* x,
               long x_stride, Product product) {
    if (!projection.a) {
      product(Range{0, rows}, Addition<E>{});
      return;
    }
    for (long r = 0; r < group_.recursions; r++) {
      const Weight& a = projection.a[r];
      gemm(team, a, {0, long(a.panels)}, slice_of(r, rows), x, x_stride,
           Assign<E>{low_, group_.low_rank, group_.low_rank});
      team.wait();
    }
    for (long r = 0; r < group_.recursions; r++) {
      product(slice_of(r, rows), Addition<E>{&projection.b[r], low_, long(group_.low_rank)});
      team.wait();
    }
  }

  template <class Finish>
  void project_all(const Team& team, const Projection& projection, long rows, const E* x,
                   long x_stride, Finish finish) {
    const Weight& weight = projection.weight;
    project(team, projection, rows, x, x_stride, [&](Range slice, Addition<E> low) {
      gemm(team, weight, {0, long(weight.panels)}, slice, x, x_stride, finish, low);
    });
  }

  Range slice_of(long recursion, long rows) const {
    return below({rows_.recursion_starts[recursion], rows_.recursion_starts[recursion + 1]}, rows);
  }

  Pages<E> pages_of(long l) const {
    E* keys = (E*)rows_.pool + (rows_.first_layer + l) * rows_.layer_stride;
    const int64_t values = rows_.page_tokens * heads_.keys * heads_.size;
    return {keys, rows_.page_stride, values, rows_.page_tokens};
  }

  void norm(const Team& team, const float* gain, long gain_stride, long rows) {
    const Range mine = team.share(rows);
    for (long n = mine.begin; n < mine.end; n++)
      norm_row(x_ + n * group_.width, gain + rows_.recursion[n] * gain_stride, group_.width,
               group_.eps, normed_ + n * normed_stride_, normed_stride_);
  }

  // Add the bias of a head at an offset of the row, then norm it, where the layer has these.
  void finish_head(float* row, long offset, const float* bias, const float* gain) const {
    float* head = row + offset;
    if (bias)
      for (long i = 0; i < heads_.size; i++) head[i] += bias[offset + i];
    if (gain) norm_row(head, gain, heads_.size, group_.eps, head, heads_.size);
  }

  void rotate_and_store(const Team& team, const Layer& layer, const Pages<E>& pages,
                        long first_key, long rows, long kv_rows) {
    const long size = heads_.size, half = size / 2;
    const long of_row = heads_.queries + heads_.keys;
    const Range mine = team.share(std::max(rows, kv_rows) * of_row);
    for (long job = mine.begin; job < mine.end; job++) {
      const long n = job / of_row, head = job % of_row;
      float* row = qkv_ + n * qkv_stride_;
      const float* cos = group_.cos + rows_.position[n] * half;
      const float* sin = group_.sin + rows_.position[n] * half;
      if (head < heads_.queries) {
        if (n >= rows) continue;
        finish_head(row, head * size, layer.bias, layer.q_gain);
        rotate_head(row + head * size, cos, sin, half, row + head * size);
        continue;
      }
      if (n >= kv_rows || rows_.slot[n] < 0) continue;
      const long key_head = head - heads_.queries;
      const long key = first_key + key_head * size, value = key + heads_.keys * size;
      finish_head(row, key, layer.bias, layer.k_gain);
      finish_head(row, value, layer.bias, nullptr);
      const ldiv_t place = std::ldiv(rows_.slot[n], pages.page_tokens);
      E* to = pages.key(place.quot, key_head, place.rem, heads_.size);
      rotate_head(row + key, cos, sin, half, to);
      copy_head(row + value, size, to + pages.values_offset);
    }
  }

  const Group& group_;
  const Rows& rows_;
  float* x_;
  const int threads_;
  const Heads heads_;
  Tables tables_{};
  AttentionPlan* plan_ = nullptr;
  AttentionPlan* last_plan_ = nullptr;
  E* normed_ = nullptr;
  float* qkv_ = nullptr;
  E* attended_ = nullptr;
  E* gated_ = nullptr;
  E* low_ = nullptr;
  char* scratch_ = nullptr;
  Partials partials_{};
  long normed_stride_ = 0, qkv_stride_ = 0, attended_stride_ = 0, gated_stride_ = 0;
};
