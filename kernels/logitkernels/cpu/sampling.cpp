// From rows of logits to tokens: the mask, temperature, top-k, top-p, min-p and the draw. The computation is
// defined by logitkernels/reference_sampling.py. Bias, penalties and bans are already in the edited logits.
//
// One thread computes a row. One pass finds its largest logit, and another copies the row if it has a mask.
// Where the temperature is above 0, about six more passes over 4 bytes per logit stay in its second-level
// cache. Only the entries that top-k keeps are sorted, and the one bucket that the edge of top-p falls into.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "top_k.h"
#include "vector.h"

namespace logitkernels {

// One row, mirrored by library.py.
struct SamplingRow {
    const float* logits;      // raw
    const float* edited;      // with bias, penalties and bans; the raw logits where there are none
    const uint32_t* allowed;  // a bit for each token, 0 where the token cannot be drawn; null without a mask
    float* processed;         // where the processed logits are written, or null
    double top_p;             // 1: off
    double min_p;             // 0: off
    double uniform;           // in [0, 1)
    int64_t top_k;            // 0: off
    float temperature;        // 0: take the largest
};

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int32_t kNotFinite = -1;       // no distribution to draw from
constexpr int32_t kNothingAllowed = -2;  // a distribution of which bans, bias and the mask leave nothing

// Copies the row's logits, with -inf where the mask has a 0. Bits beyond the vocabulary are ignored.
void apply_mask(const float* logits, const uint32_t* allowed, int64_t vocab, float* masked) {
    const __m512 minus_infinity = _mm512_set1_ps(kMinusInfinity);
    for (int64_t i = 0; i < vocab; i += kLanes) {
        const __mmask16 exists = lane_mask(vocab - i);
        const __mmask16 bits = __mmask16(allowed[i / 32] >> (i % 32));
        store(masked + i, exists, _mm512_mask_mov_ps(minus_infinity, bits, load(logits + i, exists)));
    }
}

// Takes the largest score, at its lowest id; the processed logits are a point mass on it.
int32_t take_largest(const SamplingRow& row, float largest, int64_t vocab) {
    const int32_t token = int32_t(std::find(row.edited, row.edited + vocab, largest) - row.edited);
    if (row.processed != nullptr) {
        std::fill_n(row.processed, vocab, kMinusInfinity);
        row.processed[token] = 0;
    }
    return token;
}

class Sampler {
  public:
    explicit Sampler(int64_t vocab)
        : vocab_(vocab),
          scores_(allocate<float>(round_up(vocab, kSpan))),
          masses_(allocate<float>(round_up(vocab, kSpan))),
          buckets_(allocate<uint16_t>(vocab)),
          spans_(allocate<double>(ceil_div(vocab, kSpan))) {
        std::fill(scores_.get() + vocab, scores_.get() + round_up(vocab, kSpan), kMinusInfinity);
    }

    int32_t draw(const SamplingRow& row, float largest) {
        cool(row.edited, row.temperature);
        largest_ = largest / row.temperature;
        if (!std::isfinite(largest_)) return kNotFinite;
        if (row.top_k > 0) {
            keep_top_k(std::min(row.top_k, vocab_), row.top_p, row.min_p);
        } else if (row.top_p < 1 || row.min_p > 0) {
            weigh();
            if (row.top_p < 1) keep_nucleus(row.top_p);
            // The likeliest entry has mass 1.
            if (row.min_p > 0)
                for (int64_t i = 0; i < vocab_; ++i)
                    if (masses_[i] < row.min_p) scores_[i] = kMinusInfinity;
        }
        if (row.processed != nullptr) std::memcpy(row.processed, scores_.get(), size_t(vocab_) * sizeof(float));
        return int32_t(pick(row.uniform));
    }

  private:
    static constexpr int64_t kSpan = 256;      // entries whose sum a draw checks before it checks them one by one
    static constexpr int kBuckets = 4096;      // of distances below the largest score
    static constexpr float kBucketsANat = 128;  // the last bucket holds all entries 32 nats or more below the largest

    void cool(const float* logits, float temperature) {
        const __m512 divisor = _mm512_set1_ps(temperature);
        for (int64_t i = 0; i < vocab_; i += kLanes) {
            const __mmask16 exists = lane_mask(vocab_ - i);
            store(scores_.get() + i, exists, _mm512_div_ps(load(logits + i, exists), divisor));
        }
    }

    // masses = exp(scores - largest), and their sum over each span.
    void weigh() {
        const __m512 largest = _mm512_set1_ps(largest_);
        for (int64_t span = 0; span * kSpan < vocab_; ++span) {
            __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
            for (int64_t i = span * kSpan; i < (span + 1) * kSpan; i += kLanes) {
                const __m512 e = exponential(_mm512_sub_ps(_mm512_load_ps(scores_.get() + i), largest));
                _mm512_store_ps(masses_.get() + i, e);
                low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(e)));
                high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(e, 1)));
            }
            spans_[span] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
        }
    }

    // Keeps the k largest entries, and of those the ones that top-p and min-p keep of their distribution.
    void keep_top_k(int64_t k, double top_p, double min_p) {
        std::vector<int64_t> ids(static_cast<size_t>(k));
        std::vector<float> values(static_cast<size_t>(k));
        TopK(k).select(scores_.get(), vocab_, ids.data(), values.data());
        double total = 0;
        for (float value : values) total += std::exp(double(value) - largest_);
        double before = 0;
        int64_t kept = 0;
        for (; kept < k; ++kept) {
            const double mass = std::exp(double(values[size_t(kept)]) - largest_);
            if (kept > 0 && ((top_p < 1 && before >= top_p * total) || mass < min_p)) break;
            before += mass;
        }
        std::fill_n(scores_.get(), vocab_, kMinusInfinity);
        for (int64_t i = 0; i < kept; ++i) scores_[ids[size_t(i)]] = values[size_t(i)];
    }

    // Keeps the likeliest entries whose predecessors have less than the share top_p, and always the first.
    void keep_nucleus(double top_p) {
        sums_.assign(kBuckets, 0.0);
        double total = 0;
        for (int64_t i = 0; i < vocab_; ++i) {
            const float below = std::min((largest_ - scores_[i]) * kBucketsANat, float(kBuckets - 1));
            buckets_[i] = uint16_t(below);
            sums_[buckets_[i]] += masses_[i];
            total += masses_[i];
        }
        const double target = top_p * total;
        double before = 0;
        int edge = 0;
        while (edge + 1 < kBuckets && before + sums_[size_t(edge)] < target) before += sums_[size_t(edge++)];
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < vocab_; ++i) {
            if (buckets_[i] == edge) ids.push_back(i);
            if (buckets_[i] > edge) scores_[i] = kMinusInfinity;
        }
        std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) { return scores_[a] > scores_[b]; });
        for (size_t i = 0; i < ids.size(); ++i) {
            const bool is_likeliest = edge == 0 && i == 0;
            const float mass = masses_[ids[i]];
            if (before >= target && !is_likeliest) scores_[ids[i]] = kMinusInfinity;
            before += mass;
        }
    }

    // Returns the first entry, in order of id, at which the cumulative mass exceeds the share `uniform`.
    int64_t pick(double uniform) {
        weigh();
        const int64_t spans = ceil_div(vocab_, kSpan);
        double total = 0;
        for (int64_t span = 0; span < spans; ++span) total += spans_[span];
        const double target = uniform * total;
        double before = 0;
        int64_t last = 0;
        for (int64_t span = 0; span < spans; ++span) {
            // A span's sum and the entry-by-entry sum may round differently: the span may pass the check
            // without any entry that exceeds the target.
            if (before + spans_[span] <= target && span + 1 < spans) {
                before += spans_[span];
                continue;
            }
            double cumulative = before;
            for (int64_t i = span * kSpan; i < std::min((span + 1) * kSpan, vocab_); ++i) {
                cumulative += masses_[i];
                if (masses_[i] > 0) last = i;
                if (cumulative > target) return i;
            }
            before += spans_[span];
        }
        return last;
    }

    const int64_t vocab_;
    Buffer<float> scores_, masses_;
    Buffer<uint16_t> buckets_;
    Buffer<double> spans_;
    std::vector<double> sums_;
    float largest_ = 0;
};

}  // namespace
}  // namespace logitkernels

using namespace logitkernels;

// tokens [count] receives the token of each row, or
// -1: no distribution: a NaN among the raw logits, nothing above -inf, or an inf at a temperature above 0;
// -2: a distribution of raw logits of which edits and mask leave nothing.
extern "C" void logitkernels_sample(const SamplingRow* rows, int64_t count, int64_t vocab, int32_t* tokens, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::optional<Sampler> sampler;
        Buffer<float> masked;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            SamplingRow row = rows[i];
            const float raw_largest = largest_of(row.logits, vocab);
            if (std::isnan(raw_largest) || raw_largest == kMinusInfinity) {
                tokens[i] = kNotFinite;
                continue;
            }
            if (row.allowed != nullptr) {
                if (!masked) masked = allocate<float>(vocab);
                apply_mask(row.edited, row.allowed, vocab, masked.get());
                row.edited = masked.get();
            }
            const float largest = row.edited == row.logits ? raw_largest : largest_of(row.edited, vocab);
            const bool is_infinite = row.temperature > 0 && std::isinf(raw_largest);
            if (std::isnan(largest)) {
                tokens[i] = kNotFinite;
            } else if (largest == kMinusInfinity) {
                tokens[i] = is_infinite ? kNotFinite : kNothingAllowed;
            } else if (row.temperature == 0) {
                tokens[i] = take_largest(row, largest, vocab);
            } else {
                if (!sampler) sampler.emplace(vocab);
                tokens[i] = sampler->draw(row, largest);
            }
        }
    }
}
