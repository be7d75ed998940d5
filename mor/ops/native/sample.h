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
    if (has_top_k || draw.top_p < 1) {
      fill_buckets();
      if (has_top_k) {
        const float last = edge_of(double(draw.top_k), bucket_count_).last;
        total = mass_from(last);
        if (last > edge.last) edge = {last, count};  // all that equal the k-th stay
      }
      if (draw.top_p < 1) {
        const Edge by_mass = edge_of(draw.top_p * total, bucket_mass_);
        if (by_mass.last >= edge.last) edge = by_mass;
      }
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

  void fill_buckets() {
    bucket_mass_.assign(kBuckets, 0.0);
    bucket_count_.assign(kBuckets, 0.0);
    for (long i = 0; i < count_; i++) {
      const int bucket = bucket_of(weight_[i]);
      bucket_mass_[bucket] += weight_[i];
      bucket_count_[bucket] += 1;
    }
  }

  // Where the heaviest weights reach `wanted`, of their sum or of their number.
  Edge edge_of(double wanted, const std::vector<double>& buckets) {
    double reached = 0;
    int bucket = kBuckets - 1;
    for (; bucket > 0 && reached + buckets[bucket] < wanted; bucket--) reached += buckets[bucket];
    const bool by_number = &buckets == &bucket_count_;
    inside_.clear();
    for (long i = 0; i < count_; i++)
      if (bucket_of(weight_[i]) == bucket) inside_.push_back(weight_[i]);
    std::sort(inside_.begin(), inside_.end(), std::greater<float>());
    size_t at = 0;
    for (; at < inside_.size(); at++)
      if ((reached += by_number ? 1.0 : double(inside_[at])) >= wanted) break;
    if (at >= inside_.size()) return {inside_.empty() ? 0.0f : inside_.back(), count_};
    const auto equal = std::find(inside_.begin(), inside_.end(), inside_[at]);
    return {inside_[at], int64_t(inside_.begin() + at - equal) + 1};
  }

  double mass_from(float last) const {
    double total = 0;
    for (long i = 0; i < count_; i++)
      if (weight_[i] >= last) total += weight_[i];
    return total;
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
  std::vector<double> bucket_mass_, bucket_count_;
  std::vector<int32_t> kept_;
};
