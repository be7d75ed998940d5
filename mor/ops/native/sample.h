// Drawing a token out of a row of logits: temperature, top-k, top-p, min-p, and a number of [0, 1).
//
// The readable twin is mor/engine/sampler.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

struct Draw {
  double temperature;
  double top_p;
  double min_p;
  double number;  // of [0, 1)
  int64_t top_k;  // 0 for all
};

class RowSampler {
 public:
  // Place of the token drawn; -1 where the best logit is not finite. `best` is argmax's answer.
  int64_t run(const float* logits, long count, int64_t best, const Draw& draw) {
    if (best < 0) return -1;
    const double total = weigh(logits, count, logits[best], float(1.0 / draw.temperature));
    const bool has_top_k = 0 < draw.top_k && draw.top_k < count;
    if (!has_top_k && draw.top_p >= 1) {
      if (draw.min_p == 0) return pick_all(count, total, draw.number);
      collect(count, float(draw.min_p));
    } else {
      keep_best(count, total, has_top_k ? draw.top_k : 0, draw.top_p);
      const auto below = [&](const Candidate& one) { return one.weight < float(draw.min_p); };
      kept_.erase(std::remove_if(kept_.begin(), kept_.end(), below), kept_.end());
      std::sort(kept_.begin(), kept_.end(),
                [](const Candidate& a, const Candidate& b) { return a.place < b.place; });
    }
    return pick(draw.number);
  }

 private:
  struct Candidate {
    float weight;
    int32_t place;
  };

  // Weights exp((logit - best) / temperature), the best one's is 1; returns their sum.
  double weigh(const float* logits, long count, float best, float factor) {
    weight_.resize(count);
    double total = 0;
    long i = 0;
    while (i + kLanes <= count) {
      const long stop = std::min(count - kLanes + 1, i + 64 * kLanes);
      vec sums = {};
      for (; i < stop; i += kLanes) {
        const vec value = exponential((load(logits + i) - best) * factor);
        store(weight_.data() + i, value);
        sums += value;
      }
      total += double(sum(sums));
    }
    for (; i < count; i++) {
      weight_[i] = std::exp((logits[i] - best) * factor);
      total += weight_[i];
    }
    return total;
  }

  static vec exponential(vec x) {
    const ivec is_tiny = x < splat(-87.0f);
    return ::choose(is_tiny, vec{}, exp2_of(::choose(is_tiny, vec{}, x) * kLog2E));
  }

  void collect(long count, float cut) {
    kept_.clear();
    for (long i = 0; i < count; i++)
      if (weight_[i] >= cut) kept_.push_back({weight_[i], int32_t(i)});
  }

  double mass() const {
    double total = 0;
    for (const Candidate& one : kept_) total += one.weight;
    return total;
  }

  // Keep what top-k, ties of the k-th too, and then top-p keep, the heaviest first.
  void keep_best(long count, double total, int64_t top_k, double top_p) {
    // Few tokens carry the mass, so that few are sorted: lower the cut until they suffice.
    float cut = 1e-3f;
    for (;; cut = cut > 1e-30f ? cut * 1e-3f : 0.0f) {
      collect(count, cut);
      const bool is_enough =
          top_k ? int64_t(kept_.size()) >= top_k : mass() >= top_p * total * (1 + 1e-9);
      if (is_enough || cut == 0) break;
    }
    std::sort(kept_.begin(), kept_.end(), [](const Candidate& a, const Candidate& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.place < b.place;
    });
    if (top_k) {
      const float last = kept_[top_k - 1].weight;
      size_t end = top_k;
      while (end < kept_.size() && kept_[end].weight == last) end++;
      kept_.resize(end);
      total = mass();
    }
    if (top_p >= 1) return;
    double reached = 0;
    for (size_t end = 0; end < kept_.size(); end++) {
      reached += kept_[end].weight;
      if (reached >= top_p * total) {
        kept_.resize(end + 1);
        break;
      }
    }
  }

  // The first place at which the weights add up to more than this share of their sum.
  int64_t pick(double number) const {
    const double aim = number * mass();
    double reached = 0;
    for (const Candidate& one : kept_)
      if ((reached += one.weight) > aim) return one.place;
    return kept_.back().place;
  }

  int64_t pick_all(long count, double total, double number) const {
    const double aim = number * total;
    double reached = 0;
    long last = 0;
    for (long i = 0; i < count; i++) {
      if (weight_[i] == 0) continue;
      last = i;
      if ((reached += weight_[i]) > aim) return i;
    }
    return last;
  }

  std::vector<float> weight_;
  std::vector<Candidate> kept_;
};
