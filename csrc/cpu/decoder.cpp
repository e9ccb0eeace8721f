#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "decoder_parts.hpp"
#include "kernels.hpp"
#include "norm_rope.hpp"
#include "threads.hpp"

namespace gangline {
Decoder::Decoder(DecoderSpec spec) : spec_(std::move(spec)) {
    if (spec_.layers.empty()) throw std::invalid_argument("a decoder needs at least one layer");
    x_.set_columns(spec_.hidden);
    normed_.set_columns(spec_.hidden);
    int heads_width = 0, mlp_width = 0;
    for (const DecoderLayer& layer : spec_.layers) {
        heads_width = std::max(heads_width, layer.attention.o.matrix.cols);
        if (layer.mlp) mlp_width = std::max(mlp_width, layer.mlp->down.matrix.cols);
        if (layer.attention.o.matrix.cols != spec_.layers[0].attention.o.matrix.cols)
            throw std::invalid_argument("layers differ in the width of their attention");
    }
    attended_.set_columns(heads_width);
    acted_.set_columns(mlp_width);
    for (const DecoderLayer& layer : spec_.layers) {
        for (const Linear* reader : {&layer.attention.q, &layer.attention.k, &layer.attention.v})
            normed_.add_reader(reader->matrix);
        attended_.add_reader(layer.attention.o.matrix);
        if (layer.router) normed_.add_reader(layer.router->matrix);
        if (layer.shared_gate) normed_.add_reader(layer.shared_gate->matrix);
        if (!layer.mlp) continue;
        normed_.add_reader(layer.mlp->gate.matrix);
        normed_.add_reader(layer.mlp->up.matrix);
        acted_.add_reader(layer.mlp->down.matrix);
    }
    normed_.add_reader(spec_.head.matrix);
    count_routed();
}

void Decoder::count_routed() {
    std::ptrdiff_t before = 0;
    for (const DecoderLayer& layer : spec_.layers) {
        routed_before_.push_back(before);
        before += layer.router ? layer.rule.k : 0;
        const auto known = std::find_if(cuts_.begin(), cuts_.end(),
                                        [&](const Cut& cut) { return cut.window == layer.attention.window; });
        cut_of_layer_.push_back(static_cast<int>(known - cuts_.begin()));
        if (known == cuts_.end()) {
            cuts_.emplace_back();
            cuts_.back().window = layer.attention.window;
        }
    }
}

void Decoder::begin(const Step& step) {
    step_ = step;
    for (TaskRanges& ranges : products_) ranges.restart(threads());
    cut_cache();
    make_buffers();
    find_angles();
    for (int r = 0; r < step.rows(); ++r)
        read_numbers(step.embedded, spec_.numbers, std::ptrdiff_t{r} * spec_.hidden, spec_.hidden, x_.row(r));
}

Decoder::Sight Decoder::sight(int sequence, int position, int window) const {
    const int first = static_cast<int>(step_.first[sequence]);
    if (position < first) return {position, position, position + 1};
    return {first, window > 0 ? std::max(first, position + 1 - window) : first, position + 1};
}

void Decoder::cut_cache() {
    if (step_.tokens > 1) return;
    for (Cut& cut : cuts_) {
        cut.sight.clear();
        cut.before.assign(1, 0);
        for (int r = 0; r < step_.sequences; ++r) {
            const Sight seen = sight(r, step_.length, cut.window);
            cut.sight.push_back(seen);
            cut.before.push_back(cut.before.back() + seen.last_chunk() - seen.first_chunk() + 1);
        }
    }
}

int Decoder::block_rows(std::size_t bytes_of_row) const {
    constexpr std::size_t bytes = 24 << 20;
    const int fitting = static_cast<int>(bytes / bytes_of_row) / 16 * 16;
    return std::min(step_.rows(), asked_block_rows_ > 0 ? asked_block_rows_ : std::clamp(fitting, 64, 512));
}

void Decoder::make_buffers() {
    std::ptrdiff_t qkv = 0, mlp = 0, router = 0;
    for (const DecoderLayer& layer : spec_.layers) {
        const AttentionSpec& a = layer.attention;
        qkv = std::max<std::ptrdiff_t>(qkv, qkv_width(a));
        if (layer.mlp) mlp = std::max<std::ptrdiff_t>(mlp, 2 * layer.mlp->gate.matrix.rows);
        if (layer.router) router = std::max<std::ptrdiff_t>(router, layer.rule.classes);
    }
    block_rows_ = block_rows(size(qkv + mlp + 3 * router + 1) * sizeof(float) + normed_.row_bytes() + attended_.row_bytes() +
                             acted_.row_bytes());
    const std::ptrdiff_t rows = block_rows_;
    x_.set_rows(step_.rows());
    for (ActivationRows* buffer : {&normed_, &attended_, &acted_}) buffer->set_rows(block_rows_);
    qkv_.want(size(rows * qkv));
    gate_up_.want(size(rows * mlp));
    shared_gate_.want(size(rows));
    router_.want(size(rows * router));
    scratch_.want(size(rows * 2 * router));
    if (spec_.numbers != Format::f32) logits_.want(size(std::ptrdiff_t{step_.sequences} * spec_.head.matrix.rows));
    want_sums();
    want_partials();
}

void Decoder::want_partials() {
    if (step_.tokens > 1) return;
    std::ptrdiff_t pieces = 0, group = 0, head_dim = 0;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
        const AttentionSpec& a = spec_.layers[l].attention;
        const Cut& cut = cuts_[size(cut_of_layer_[l])];
        pieces = std::max<std::ptrdiff_t>(pieces, std::ptrdiff_t{cut.before.back()} * a.kv_heads);
        group = std::max<std::ptrdiff_t>(group, a.heads / a.kv_heads);
        head_dim = std::max<std::ptrdiff_t>(head_dim, a.head_dim);
    }
    partial_.want(size(pieces * group * head_dim));
    partial_max_.want(size(pieces * group));
    partial_sum_.want(size(pieces * group));
}

void Decoder::release() {
    for (ActivationRows* buffer : {&x_, &normed_, &attended_, &acted_}) buffer->release();
    for (Buffer<float>* buffer : {&qkv_, &gate_up_, &shared_gate_, &router_, &scratch_, &logits_, &partial_, &partial_max_,
                                  &partial_sum_, &pair_output_, &sums_})
        buffer->free();
    cosine_ = {};
    sine_ = {};
}

void Decoder::find_angles() {
    const std::size_t half = spec_.inverse_frequencies.size();
    cosine_.resize(size(step_.rows()) * half);
    sine_.resize(cosine_.size());
    const auto rounded = [&](float x) {  // as the model does, to its number format
        if (spec_.numbers == Format::bf16) return bf16_to_float(float_to_bf16(x));
        return spec_.numbers == Format::f16 ? f16_to_float(float_to_f16(x)) : x;
    };
    for (std::size_t t = 0; t < size(step_.rows()); ++t) {
        for (std::size_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(step_.positions[t]) * spec_.inverse_frequencies[i];
            cosine_[t * half + i] = rounded(std::cos(angle) * spec_.rope_scaling);
            sine_[t * half + i] = rounded(std::sin(angle) * spec_.rope_scaling);
        }
    }
}

void Decoder::front(int layer) {
    parallel([this, layer](int worker, int workers) { front(layer, {worker, workers}, false); });
}

void Decoder::front(int layer, Team team, bool together) {
    if (step_.last_only && step_.tokens > 1 && size(layer) + 1 == spec_.layers.size()) {
        store_all(layer, team);
        if (team.worker == 0) keep_last_tokens(layer);
        barrier();
    }
    for (int begin = 0; begin < step_.rows(); begin += block_rows_) {
        const Rows block{begin, std::min(block_rows_, step_.rows() - begin)};
        attention(layer, block, team);
        network(layer, block, team, together);
    }
}

// Keys and values of all tokens.
void Decoder::store_all(int layer, Team team) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    const AttentionSpec& a = l.attention;
    const int width = qkv_width(a);
    float* k = qkv_.data() + a.q.matrix.rows;
    for (int begin = 0; begin < step_.rows(); begin += block_rows_) {
        const Rows block{begin, std::min(block_rows_, step_.rows() - begin)};
        normalise(l.attention_norm, block, team);
        const Product products[] = {{&a.k, &normed_, block.count, k, width},
                                    {&a.v, &normed_, block.count, k + a.k.matrix.rows, width}};
        multiply_all(products, 2, team, 0);
        store_rows(layer, block, team);
        barrier();
    }
}

// The step goes on as one of each sequence's last token.
void Decoder::keep_last_tokens(int layer) {
    const int rows = step_.rows(), tokens = step_.tokens;
    const std::ptrdiff_t half = static_cast<std::ptrdiff_t>(spec_.inverse_frequencies.size());
    for (int s = 0; s < step_.sequences; ++s) {
        const std::ptrdiff_t last = std::ptrdiff_t{s + 1} * tokens - 1;
        if (last == s) continue;
        std::copy_n(x_.row(static_cast<int>(last)), spec_.hidden, x_.row(s));
        std::copy_n(cosine_.begin() + last * half, half, cosine_.begin() + s * half);
        std::copy_n(sine_.begin() + last * half, half, sine_.begin() + s * half);
    }
    step_.length += tokens - 1;
    step_.tokens = 1;
    // Where the layers before have left the choices of all rows.
    const std::ptrdiff_t more = routed_before_[size(layer)] * (rows - step_.rows());
    step_.ids += more;
    step_.weights += more;
    cut_cache();
    want_partials();
}

// normed_ = norm(x_), with its int8 forms.
void Decoder::normalise(const Norm& norm, Rows rows, Team team) {
    const int blocks = normed_.blocks();
    const Range mine = share(rows.count * blocks, 1, team.worker, team.workers);
    int known = -1;
    float inverse = 0.0f;
    for (int i = mine.begin; i < mine.end; ++i) {
        const int t = i / blocks, begin = i % blocks * ActivationRows::block;
        const float* x = x_.row(rows.begin + t * rows.step);
        if (t != known) inverse = inverse_rms(x, spec_.hidden, norm.eps);
        known = t;
        const int count = std::min(ActivationRows::block, spec_.hidden - begin);
        scale_by_norm(norm, x + begin, inverse, begin, count, normed_.row(t) + begin);
        normed_.quantize(t, i % blocks, spec_.hidden);
    }
    barrier();
}

// Products, and the meeting behind them. The next products use another counter, so that this one can be set back.
void Decoder::multiply_all(const Product* products, int count, Team team, int counter) {
    multiply(products, count, team, products_[counter]);
    barrier();
    if (team.worker == 0) products_[counter].restart(team.workers);
}

void Decoder::attention(int layer, Rows block, Team team) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    const AttentionSpec& a = l.attention;
    normalise(l.attention_norm, block, team);
    const int width = qkv_width(a);
    float* q = qkv_.data();
    const Product products[] = {{&a.q, &normed_, block.count, q, width},
                                {&a.k, &normed_, block.count, q + a.q.matrix.rows, width},
                                {&a.v, &normed_, block.count, q + a.q.matrix.rows + a.k.matrix.rows, width}};
    multiply_all(products, 3, team, 0);
    if (step_.tokens > 1) attend_tiles(layer, block, team);
    else attend_pieces(layer, block, team);
    // normed_ has been read, and has the room for the product.
    const Product output{&a.o, &attended_, block.count, normed_.data(), x_.stride(), x_.row(block.begin)};
    multiply_all(&output, 1, team, 1);
}

void Decoder::network(int layer, Rows block, Team team, bool together) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    normalise(l.mlp_norm, block, team);
    Product products[4];
    int count = 0;
    if (l.router) products[count++] = {&*l.router, &normed_, block.count, router_.data(), l.rule.classes};
    if (l.shared_gate) products[count++] = {&*l.shared_gate, &normed_, block.count, shared_gate_.data(), 1};
    const int width = l.mlp ? l.mlp->gate.matrix.rows : 0;
    if (l.mlp) {
        products[count++] = {&l.mlp->gate, &normed_, block.count, gate_up_.data(), 2 * width};
        products[count++] = {&l.mlp->up, &normed_, block.count, gate_up_.data() + width, 2 * width};
    }
    multiply_all(products, count, team, 0);
    if (l.router) choose(layer, block, team);
    // One row's choice is the first worker's, who goes on with it: then nobody else has to wait for it here.
    if (!l.mlp && step_.rows() == 1 && together) return;
    if (l.mlp) {
        const int blocks = (width + ActivationRows::block - 1) / ActivationRows::block;
        const Range mine = share(block.count * blocks, 1, team.worker, team.workers);
        for (int i = mine.begin; i < mine.end; ++i) {
            const int t = i / blocks, begin = i % blocks * ActivationRows::block;
            const float* gate = gate_up_.data() + std::ptrdiff_t{t} * 2 * width + begin;
            const int n = std::min(ActivationRows::block, width - begin);
            kernels().rows.gate(l.mlp->activation, gate, gate + width, 1, acted_.row(t) + begin, n);
            acted_.quantize(t, i % blocks, width);
        }
        barrier();
        const float* gate = l.shared_gate ? shared_gate_.data() : nullptr;
        const Product down{&l.mlp->down, &acted_, block.count, normed_.data(), x_.stride(), x_.row(block.begin), gate};
        multiply_all(&down, 1, team, 1);
        return;
    }
    barrier();
}

void Decoder::choose(int layer, Rows block, Team team) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    const bool alone = step_.rows() == 1;
    const Range mine = alone ? Range{0, team.worker == 0 ? 1 : 0} : share(block.count, 1, team.worker, team.workers);
    const std::ptrdiff_t first = routed_before_[size(layer)] * step_.rows();
    for (int t = mine.begin; t < mine.end; ++t) {
        const std::ptrdiff_t row = block.begin + t, at = first + row * l.rule.k;
        route(l.rule, router_.data() + std::ptrdiff_t{t} * l.rule.classes,
              scratch_.data() + std::ptrdiff_t{t} * 2 * l.rule.classes, step_.ids + at, step_.weights + at);
        std::copy_n(normed_.row(t), spec_.hidden, step_.moe_input + row * spec_.hidden);
    }
}

void Decoder::back(const float* moe_output) {
    constexpr int few = 16;  // a meeting takes longer
    const auto add = [&](int worker, int workers) {
        const Range mine = share(step_.rows(), 1, worker, workers);
        for (int r = mine.begin; r < mine.end; ++r)
            add_output(r, 0, spec_.hidden, moe_output + std::ptrdiff_t{r} * spec_.hidden);
    };
    if (step_.rows() <= few) add(0, 1);
    else parallel(add);
}

void Decoder::add_output(int row, int begin, int count, const float* y) {
    float* x = x_.row(row) + begin;
    for (int d = 0; d < count; ++d) x[d] += y[d];
}

void Decoder::head() {
    parallel([this](int worker, int workers) { head({worker, workers}); });
}

// Of every sequence's last token.
void Decoder::head(Team team) {
    const int classes = spec_.head.matrix.rows;
    const bool plain = spec_.numbers == Format::f32;
    for (int begin = 0; begin < step_.sequences; begin += block_rows_) {
        const int count = std::min(block_rows_, step_.sequences - begin);
        const std::ptrdiff_t first = std::ptrdiff_t{begin} * classes;
        float* logits = plain ? static_cast<float*>(step_.logits) + first : logits_.data();
        normalise(spec_.final_norm, {(begin + 1) * step_.tokens - 1, count, step_.tokens}, team);
        const Product product{&spec_.head, &normed_, count, logits, classes};
        multiply_all(&product, 1, team, 1);
        if (plain) continue;
        const Range mine = share(classes, 64, team.worker, team.workers);
        for (int t = 0; t < count; ++t) {
            const std::ptrdiff_t at = std::ptrdiff_t{t} * classes + mine.begin;
            write_numbers(logits + at, mine.end - mine.begin, spec_.numbers,
                          static_cast<std::uint16_t*>(step_.logits) + first + at);
        }
        barrier();
    }
}

}  // namespace gangline
