// The C interface: plain pointers and structs, as mor/ops/native/compiled.py lays them out.
//
// Functions that need memory return 0 when there is none; all others cannot fail.
#include <cstdlib>

#include "sample.h"
#include "tick.h"

static thread_local Workspace workspace;

template <class E, class Out>
static bool linear(const Weight& weight, const void* x, int64_t x_is_float, int64_t inputs,
                   int64_t rows, Out* out, int64_t out_stride, int threads) {
  // Rows are taken as they lie where they already are what a step reads.
  const bool is_ready = inputs == row_places<E>(weight) &&
                        bool(x_is_float) == (Step<E>::kInputs == 1);
  const long stride = row_places<E>(weight);
  E* copy = nullptr;
  if (!is_ready && !(copy = (E*)workspace.reserve(rows * stride * sizeof(E)))) return false;
  run_team(threads, [&](const Team& team) {
    if (copy) {
      const Range mine = team.share(rows);
      for (long n = mine.begin; n < mine.end; n++) {
        E* to = copy + n * stride;
        if (x_is_float)
          copy_head((const float*)x + n * inputs, inputs, to);
        else
          for (long i = 0; i < inputs; i++) put(to + i, to_float(((const bf16*)x)[n * inputs + i]));
        for (long i = inputs; i < stride; i++) put(to + i, 0.0f);
      }
      team.wait();
    }
    gemm(team, weight, {0, long(weight.panels)}, {0, rows}, copy ? copy : (const E*)x, stride,
         Assign<Out>{out, out_stride, weight.outputs});
  });
  return true;
}

template <class E>
static bool attention(const Rows& rows, const Heads& heads, const float* queries, E* out,
                      int threads) {
  static thread_local AttentionPlan of_caller;
  AttentionPlan& plan = of_caller;  // named in the team, it would be each thread's own
  const Tables tables{rows.tables, rows.tables_stride, rows.table, rows.count};
  plan.make(tables, rows.rows, heads);
  const long padded = heads.panels() * kPanel, bytes = AttentionScratch<E>::bytes(heads);
  char* memory = workspace.reserve(plan.partials * (padded + 2) * sizeof(float) + threads * bytes);
  if (!memory) return false;
  Partials partials;
  partials.sums = (float*)(memory + threads * bytes);
  partials.most = partials.sums + plan.partials * padded;
  partials.total = partials.most + plan.partials;
  const Pages<E> pages{(E*)rows.pool, rows.page_stride, rows.layer_stride, rows.page_tokens};
  const int64_t stride = int64_t(heads.queries) * heads.size;
  run_team(threads, [&](const Team& team) {
    AttentionScratch<E> scratch;
    scratch.place(memory + team.thread * bytes, heads);
    attend(team, plan, heads, pages, tables, Queries<E>{queries, stride, out, stride}, scratch, partials);
  });
  return true;
}

template <class E>
static void store_rows(const Rows& rows, const Heads& heads, const E* keys, const E* values) {
  for (long n = 0; n < rows.rows; n++) {
    if (rows.slot[n] < 0) continue;
    const ldiv_t place = std::ldiv(rows.slot[n], rows.page_tokens);
    const Pages<E> pages{(E*)rows.pool, rows.page_stride, rows.layer_stride, rows.page_tokens};
    for (long g = 0; g < heads.keys; g++) {
      E* to = pages.key(place.quot, g, place.rem, heads.size);
      const long from = (n * heads.keys + g) * heads.size;
      std::memcpy(to, keys + from, heads.size * sizeof(E));
      std::memcpy(to + pages.values_offset, values + from, heads.size * sizeof(E));
    }
  }
}

// Place of the largest logit, the first of equals; -1 if one is NaN or it is not finite.
static int64_t argmax(const float* logits, long count) {
  constexpr int kRuns = 4;
  vec top[kRuns];
  ivec is_nan = {};
  for (int r = 0; r < kRuns; r++) top[r] = splat(-INFINITY);
  long i = 0;
  for (; i + kRuns * kLanes <= count; i += kRuns * kLanes)
    for (int r = 0; r < kRuns; r++) {
      const vec value = load(logits + i + r * kLanes);
      is_nan |= value != value;
      top[r] = choose(value > top[r], value, top[r]);
    }
  float high = -INFINITY;
  bool has_nan = false;
  for (int r = 0; r < kRuns; r++) high = std::max(high, largest(top[r]));
  for (int l = 0; l < kLanes; l++) has_nan |= is_nan[l] != 0;
  for (; i < count; i++) {
    has_nan |= logits[i] != logits[i];
    high = std::max(high, logits[i]);
  }
  if (has_nan || !std::isfinite(high)) return -1;
  for (i = 0; logits[i] != high; i++) {
  }
  return i;
}

extern "C" {

#if defined(_OPENMP)
#define MOR_THREADS ""
#else
#define MOR_THREADS ", one thread: compiled without OpenMP"
#endif

const char* mor_instructions() {
#if defined(__AVX512BF16__)
  return "avx512_bf16" MOR_THREADS;
#elif defined(__AVX512F__)
  return "avx512" MOR_THREADS;
#elif defined(__AVX2__)
  return "avx2" MOR_THREADS;
#else
  return "portable" MOR_THREADS;
#endif
}

int mor_linear(const Weight* weight, int is_bf16, const void* x, int x_is_float, int64_t inputs,
               int64_t rows, void* out, int out_is_float, int64_t out_stride, int threads) {
  if (!is_bf16)
    return linear<float>(*weight, x, x_is_float, inputs, rows, (float*)out, out_stride, threads);
  if (out_is_float)
    return linear<bf16>(*weight, x, x_is_float, inputs, rows, (float*)out, out_stride, threads);
  return linear<bf16>(*weight, x, x_is_float, inputs, rows, (bf16*)out, out_stride, threads);
}

int mor_layers(const Group* group, const Rows* rows, float* x, int threads) {
  if (group->is_bf16) return LayerCall<bf16>(*group, *rows, x, threads).run(workspace);
  return LayerCall<float>(*group, *rows, x, threads).run(workspace);
}

// rows->layer_stride is the way from keys to values here.
int mor_attention(const Rows* rows, int query_heads, int key_heads, int head_size, int is_bf16,
                  const float* queries, void* out, int threads) {
  const Heads heads{query_heads, key_heads, head_size};
  if (is_bf16) return attention<bf16>(*rows, heads, queries, (bf16*)out, threads);
  return attention<float>(*rows, heads, queries, (float*)out, threads);
}

void mor_store(const Rows* rows, int key_heads, int head_size, int is_bf16, const void* keys,
               const void* values) {
  const Heads heads{key_heads, key_heads, head_size};
  if (is_bf16)
    store_rows(*rows, heads, (const bf16*)keys, (const bf16*)values);
  else
    store_rows(*rows, heads, (const float*)keys, (const float*)values);
}

void mor_rms_norm(const float* x, const float* gain, int64_t rows, int64_t width, float eps,
                  void* out, int out_is_float, int threads) {
  run_team(threads, [&](const Team& team) {
    const Range mine = team.share(rows);
    for (long n = mine.begin; n < mine.end; n++) {
      if (out_is_float)
        norm_row(x + n * width, gain, width, eps, (float*)out + n * width, width);
      else
        norm_row(x + n * width, gain, width, eps, (bf16*)out + n * width, width);
    }
  });
}

void mor_argmax(const float* logits, int64_t rows, int64_t count, int64_t* out, int threads) {
  run_team(threads, [&](const Team& team) {
    const Range mine = team.share(rows);
    for (long n = mine.begin; n < mine.end; n++) out[n] = argmax(logits + n * count, count);
  });
}

// draws[n].number decides; best is what mor_argmax gave.
void mor_sample(const float* logits, int64_t rows, int64_t count, const Draw* draws,
                const int64_t* best, int64_t* out, int threads) {
  run_team(threads, [&](const Team& team) {
    static thread_local RowSampler sampler;
    const Range mine = team.share(rows);
    for (long n = mine.begin; n < mine.end; n++)
      out[n] = sampler.run(logits + n * count, count, best[n], draws[n]);
  });
}

int mor_enter(const State* state, const Flights* flights, const Group* prelude, int threads) {
  return Tick(*state, *flights, threads).enter(prelude, workspace);
}

int mor_recursion(const State* state, const Flights* flights, const Group* block, int threads,
                  uint8_t* goes_on, uint8_t* has_spare) {
  return Tick(*state, *flights, threads).recursion(*block, workspace, goes_on, has_spare);
}

int mor_leave(const State* state, const Flights* flights, const Group* coda, int threads,
              int64_t num_full, const float* gain, float eps, int is_bf16, void* out) {
  Tick tick(*state, *flights, threads);
  if (is_bf16) return tick.leave(coda, workspace, num_full, gain, eps, (bf16*)out);
  return tick.leave(coda, workspace, num_full, gain, eps, (float*)out);
}
}
