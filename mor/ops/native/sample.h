// Drawing a token out of a row of logits: temperature, top-k, top-p, min-p, and a number of [0, 1).
//
// The readable twin is mor/engine/sampler.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
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
    count_ = count;
    double total = weigh(logits, logits[best], float(1.0 / draw.temperature));
    Edge edge{float(draw.min_p), count};
    const bool has_top_k = 0 < draw.top_k && draw.top_k < count;
    if (has_top_k) total = keep_top_k(logits, logits[best], float(draw.temperature), draw.top_k);
    if (draw.top_p < 1) {
      const Edge by_mass = edge_of_mass(draw.top_p * total);
      if (by_mass.last >= edge.last) edge = by_mass;
    }
    return pick(edge, draw.number);
  }

 private:
  // Weights above `last` are kept, and `room` of those that equal it, lower places first.
  struct Edge {
    float last;
    int64_t room;
  };

  // A weight's bucket: its exponent and the first bits of its mantissa, so heavier is higher.
  static constexpr int kShift = 18;
  static constexpr int kBuckets = (0x3F800000 >> kShift) + 1;  // weights are at most 1

  static int bucket_of(float weight) { return int(bits_as<uint32_t>(weight) >> kShift); }

  // Weights exp((logit - best) / temperature), the best one's is 1; returns their sum.
  double weigh(const float* logits, float best, float factor) {
    weight_.resize(count_);
    double total = 0;
    long i = 0;
    while (i + kLanes <= count_) {
      const long stop = std::min(count_ - kLanes + 1, i + 64 * kLanes);
      vec sums = {};
      for (; i < stop; i += kLanes) {
        const vec value = exponential((load(logits + i) - best) * factor);
        store(weight_.data() + i, value);
        sums += value;
      }
      total += double(sum(sums));
    }
    for (; i < count_; i++) {
      weight_[i] = std::min(std::exp((logits[i] - best) * factor), 1.0f);
      total += weight_[i];
    }
    return total;
  }

  static vec exponential(vec x) {
    const ivec is_tiny = x < splat(-87.0f);
    const vec value = exp2_of(choose(is_tiny, vec{}, x) * kLog2E);
    return choose(is_tiny, vec{}, choose(value > 1.0f, splat(1.0f), value));
  }

  // Set the weights below the k-th best score to 0; ties of it stay. Returns the sum of the rest.
  // Scores decide, since those that differ may have equal weights.
  double keep_top_k(const float* logits, float best, float temperature, int64_t k) {
    bucket_.assign(kBuckets, 0.0);
    for (long i = 0; i < count_; i++) bucket_[bucket_of(weight_[i])] += 1;
    int64_t before = 0;
    int bucket = kBuckets - 1;
    for (; before + int64_t(bucket_[bucket]) < k; bucket--) before += int64_t(bucket_[bucket]);
    const auto score = [&](long i) { return (logits[i] - best) / temperature; };
    inside_.clear();
    for (long i = 0; i < count_; i++)
      if (bucket_of(weight_[i]) == bucket) inside_.push_back(score(i));
    const auto kth = inside_.begin() + (k - before - 1);
    std::nth_element(inside_.begin(), kth, inside_.end(), std::greater<float>());
    double total = 0;
    for (long i = 0; i < count_; i++) {
      const int at = bucket_of(weight_[i]);
      if (at < bucket || (at == bucket && score(i) < *kth)) weight_[i] = 0;
      total += weight_[i];
    }
    return total;
  }

  // Where the heaviest weights reach `wanted` together.
  Edge edge_of_mass(double wanted) {
    bucket_.assign(kBuckets, 0.0);
    for (long i = 0; i < count_; i++) bucket_[bucket_of(weight_[i])] += weight_[i];
    double reached = 0;
    int bucket = kBuckets - 1;
    for (; bucket > 0 && reached + bucket_[bucket] < wanted; bucket--) reached += bucket_[bucket];
    inside_.clear();
    for (long i = 0; i < count_; i++)
      if (bucket_of(weight_[i]) == bucket) inside_.push_back(weight_[i]);
    std::sort(inside_.begin(), inside_.end(), std::greater<float>());
    size_t at = 0;
    for (; at < inside_.size(); at++)
      if ((reached += double(inside_[at])) >= wanted) break;
    if (at >= inside_.size()) return {inside_.empty() ? 0.0f : inside_.back(), count_};
    const auto equal = std::find(inside_.begin(), inside_.end(), inside_[at]);
    return {inside_[at], int64_t(inside_.begin() + at - equal) + 1};
  }

  // The first place at which the kept weights add up to more than this share of their sum.
  int64_t pick(Edge edge, double number) {
    double total = 0;
    int64_t room = edge.room;
    kept_.clear();
    for (long i = 0; i < count_; i++) {
      const float weight = weight_[i];
      if (weight < edge.last || weight == 0 || (weight == edge.last && room-- <= 0)) continue;
      kept_.push_back(int32_t(i));
      total += weight;
    }
    const double aim = number * total;
    double reached = 0;
    for (const int32_t place : kept_)
      if ((reached += weight_[place]) > aim) return place;
    return kept_.back();
  }

  long count_ = 0;
  std::vector<float> weight_, inside_;
  std::vector<double> bucket_;  // a number or a sum of weights each
  std::vector<int32_t> kept_;
};
