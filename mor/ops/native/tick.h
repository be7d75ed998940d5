// One tick of rows of mixed depth: where they stand, the layers, and who goes on.
//
// The readable twin is mor/engine/runner.py; names are the same there.
#pragma once

#include <vector>

#include "layer.h"

enum Gating : int32_t { kNone = 0, kWeighted = 1, kResidual = 2, kAdditive = 3 };
enum Deciding : int32_t { kEveryone = 0, kScore = 1, kRandom = 2 };

struct State {
  // of every row of state
  float* x;  // (rows, D)
  float* gate;
  int64_t* position;
  int64_t* token;
  int64_t* depth;
  const int64_t* limit;
  const uint8_t* is_replayed;
  // of every request
  const double* threshold;  // (requests, R)
  int64_t* count;           // (requests, tables)
  int64_t* reserved;
  const int64_t* held;      // pages
  const int64_t* serves;    // 1 where a request can have tokens
  const int32_t* tables;    // (requests x tables, pages)
  // of the model
  const void* embedding;
  const float* router;       // (R, D), null without scores and gates
  const float* router_bias;  // (R) or null
  const float* encoding;     // (R, D) or null
  const double* share;       // (R), for random draws
  void* pool;
  int64_t width, recursions, num_tables, table_width, page_stride, layer_stride_per_token;
  int64_t own_page_tokens;  // 0 without own layers
  int64_t block_page_tokens;
  int64_t prelude_layers;
  int64_t seed;  // seed x its factor, wrapped
  int32_t embedding_is_bf16, keeps_first_keys, gating, deciding;
  float gate_factor;
};

// Tokens of one request in this call: consecutive in `rows`, in order of position.
struct Flights {
  const int64_t* rows;  // state rows of all flights, one after the other
  const int64_t* slot;  // of each flight: its request
  const int64_t* active;
  const int64_t* length;     // places that the flight reserved at each depth
  const int64_t* recursion;  // from 0, ascending
  int64_t num_rows, num_flights;
};

class Tick {
 public:
  Tick(const State& state, const Flights& flights, int threads)
      : s_(state), f_(flights), threads_(threads), n_(flights.num_rows) {
    row_slot_.resize(n_);
    position_.resize(n_);
    recursion_.assign(n_, 0);
    table_.resize(n_);
    count_.resize(n_);
    place_.resize(n_);
    x_.resize(n_ * s_.width);
    long n = 0;
    for (long f = 0; f < f_.num_flights; f++)
      for (long i = 0; i < f_.active[f]; i++, n++) {
        row_slot_[n] = f_.slot[f];
        position_[n] = int32_t(s_.position[f_.rows[n]]);
      }
  }

  // Embed tokens and run the prelude; positions and tokens stand in the state.
  bool enter(const Group* prelude, Workspace& workspace) {
    for (long n = 0; n < n_; n++) embed(s_.token[f_.rows[n]], x_.data() + n * s_.width);
    if (s_.own_page_tokens)  // of the coda too, which stores its keys later
      for (long f = 0; f < f_.num_flights; f++) {
        s_.count[f_.slot[f] * s_.num_tables] += f_.length[f];
        s_.reserved[f_.slot[f] * s_.num_tables] -= f_.length[f];
      }
    if (prelude) {
      own_places();
      if (!run(*prelude, s_.own_page_tokens, 0, n_, n_, workspace)) return false;
    }
    for (long n = 0; n < n_; n++) {
      const long row = f_.rows[n];
      s_.depth[row] = 0;
      put_back(n);
      if (s_.router) s_.gate[row] = s_.gate_factor * sigmoid(logit(n, 0));
    }
    return true;
  }

  // Run the block, join and route; goes_on says who takes another recursion. Places that a flight
  // did not use are given back, and has_spare says whose request then holds pages for nothing.
  bool recursion(const Group& block, Workspace& workspace, uint8_t* goes_on, uint8_t* has_spare) {
    const long kv_rows = block_places();
    gather();
    const std::vector<float> before = x_;
    if (!run(block, s_.block_page_tokens, 0, kv_rows, n_, workspace)) return false;
    for (long n = 0; n < n_; n++) {
      const long row = f_.rows[n], following = recursion_[n] + 1;
      join(n, before.data() + n * s_.width, s_.gate[row]);
      put_back(n);
      s_.depth[row] = following;
      goes_on[n] = following < s_.limit[row] && decide(n, row, following);
    }
    long n = 0;
    for (long f = 0; f < f_.num_flights; f++) {
      bool is_through = true;
      for (long i = 0; i < f_.active[f]; i++, n++) is_through &= !goes_on[n];
      has_spare[f] = give_back(f, is_through);
    }
    return true;
  }

  // Run the coda and the last norm; out gets the first num_full rows. Without a coda, the norm.
  template <class E>
  bool leave(const Group* coda, Workspace& workspace, long num_full, const float* gain, float eps,
             E* out) {
    gather();
    if (coda) {
      own_places();
      if (!run(*coda, s_.own_page_tokens, s_.prelude_layers, n_, num_full, workspace))
        return false;
    }
    for (long n = 0; n < num_full; n++)
      norm_row(&x_[n * s_.width], gain, s_.width, eps, out + n * s_.width, s_.width);
    return true;
  }

 private:
  void embed(int64_t token, float* out) {
    for (long i = 0; i < s_.width; i++)
      out[i] = s_.embedding_is_bf16 ? to_float(((const bf16*)s_.embedding)[token * s_.width + i])
                                    : ((const float*)s_.embedding)[token * s_.width + i];
  }

  void gather() {
    for (long n = 0; n < n_; n++)
      std::memcpy(&x_[n * s_.width], s_.x + f_.rows[n] * s_.width, s_.width * sizeof(float));
  }

  void put_back(long n) {
    std::memcpy(s_.x + f_.rows[n] * s_.width, &x_[n * s_.width], s_.width * sizeof(float));
  }

  void set_place(long n, long table, long place, long page_tokens, bool makes_keys) {
    const long index = row_slot_[n] * s_.num_tables + table;
    const long page = s_.tables[index * s_.table_width + place / page_tokens];
    table_[n] = int32_t(index);
    count_[n] = int32_t(place + 1);
    place_[n] = makes_keys ? page * page_tokens + place % page_tokens : -1;
  }

  // In prelude and coda every token has a place: its position.
  void own_places() {
    for (long n = 0; n < n_; n++) set_place(n, 0, position_[n], s_.own_page_tokens, true);
  }

  // Turn reserved places of the block into tokens; returns the rows that make keys and values.
  long block_places() {
    long n = 0, kv_rows = 0;
    for (long f = 0; f < f_.num_flights; f++) {
      const long recursion = f_.recursion[f];
      const bool makes_keys = !s_.keeps_first_keys || recursion == 0;
      const long table = makes_keys ? 1 + recursion : 1;
      const long index = f_.slot[f] * s_.num_tables + table;
      for (long i = 0; i < f_.active[f]; i++, n++) {
        recursion_[n] = int32_t(recursion);
        const long place = makes_keys ? s_.count[index]++ : position_[n];
        set_place(n, table, place, s_.block_page_tokens, makes_keys);
      }
      if (makes_keys) {
        s_.reserved[index] -= f_.length[f];
        kv_rows = n;
      }
    }
    return kv_rows;
  }

  bool give_back(long f, bool is_through) {
    const long first = f_.slot[f] * s_.num_tables;
    bool has_spare = false;
    for (long t = 1; t < s_.num_tables; t++) {
      const long index = first + t;
      if (is_through && t > f_.recursion[f] + 1)
        s_.reserved[index] -= f_.length[f] * s_.serves[index];
      const long places = s_.count[index] + s_.reserved[index];
      has_spare |= s_.held[index] * s_.block_page_tokens >= places + s_.block_page_tokens;
    }
    return has_spare;
  }

  bool run(const Group& group, long page_tokens, long first_layer, long kv_rows, long full_rows,
           Workspace& workspace) {
    std::vector<int32_t> starts(s_.recursions + 1);
    for (long r = 0, n = 0; r <= s_.recursions; r++) {
      while (n < n_ && recursion_[n] < r) n++;
      starts[r] = int32_t(n);
    }
    const Rows rows{position_.data(), recursion_.data(), table_.data(), count_.data(),
                    place_.data(), s_.tables, starts.data(), s_.pool, n_, kv_rows, full_rows,
                    s_.table_width, s_.page_stride, s_.layer_stride_per_token * page_tokens,
                    page_tokens, first_layer};
    if (group.is_bf16) return LayerCall<bf16>(group, rows, x_.data(), threads_).run(workspace);
    return LayerCall<float>(group, rows, x_.data(), threads_).run(workspace);
  }

  void join(long n, const float* before, float gate) {
    float* x = &x_[n * s_.width];
    const float* encoding = s_.encoding ? s_.encoding + recursion_[n] * s_.width : nullptr;
    for (long i = 0; i < s_.width; i++) {
      const float made = encoding ? x[i] * encoding[i] : x[i];
      switch (s_.gating) {
        case kWeighted: x[i] = before[i] + gate * made; break;
        case kResidual: x[i] = before[i] + gate * (made - before[i]); break;
        case kAdditive: x[i] = before[i] + made; break;
        default: x[i] = made;
      }
    }
  }

  float logit(long n, long recursion) const {
    const float* x = &x_[n * s_.width];
    const float* weight = s_.router + recursion * s_.width;
    vec total = {};
    long i = 0;
    for (; i + kLanes <= s_.width; i += kLanes) total += load(x + i) * load(weight + i);
    float result = sum(total);
    for (; i < s_.width; i++) result += x[i] * weight[i];
    return result + (s_.router_bias ? s_.router_bias[recursion] : 0.0f);
  }

  static float sigmoid(float value) { return 1.0f / (1.0f + std::exp(-value)); }

  // Say whether a row takes a recursion, and note the gate that it would have there.
  bool decide(long n, long row, long recursion) {
    if (!s_.router) return true;
    const float asked = logit(n, recursion);
    s_.gate[row] = s_.gate_factor * sigmoid(asked);
    if (s_.is_replayed[row]) return true;
    if (s_.deciding == kRandom) return draw(row, recursion) < s_.share[recursion];
    return double(asked) > s_.threshold[row_slot_[n] * s_.recursions + recursion];
  }

  // mor.ops.select.hash_uniform, in wrapping arithmetic.
  double draw(long row, long recursion) const {
    uint64_t state = uint64_t(s_.position[row]) * 0x9E3779B97F4A7C15u;
    state += uint64_t(s_.token[row]) * 0xC2B2AE3D27D4EB4Fu;
    state += uint64_t(s_.seed) + uint64_t(recursion + 1) * 0xD6E8FEB86659FD93u;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9u;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBu;
    state ^= state >> 31;
    return double(state >> 11) / 9007199254740992.0;
  }

  const State& s_;
  const Flights& f_;
  const int threads_;
  const long n_;
  std::vector<int64_t> row_slot_, place_;
  std::vector<int32_t> position_, recursion_, table_, count_;
  std::vector<float> x_;
};
