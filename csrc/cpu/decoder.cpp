#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "kernels.hpp"
#include "norm_rope.hpp"
#include "threads.hpp"

namespace gangline {
namespace {

int qkv_width(const AttentionSpec& a) { return a.q.matrix.rows + a.k.matrix.rows + a.v.matrix.rows; }

// Numbers of fp32 in the model's format.
void write_numbers(const float* x, int n, Format format, void* y) {
    if (format == Format::f32) {
        std::copy_n(x, n, static_cast<float*>(y));
    } else if (format == Format::bf16) {
        kernels().rows.narrow_bf16(x, static_cast<std::uint16_t*>(y), n);
    } else {
        kernels().rows.narrow_f16(x, static_cast<std::uint16_t*>(y), n);
    }
}

std::size_t size(std::ptrdiff_t count) { return static_cast<std::size_t>(count); }

}  // namespace

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
    cut_cache();
    make_buffers();
    find_angles();
    for (int t = 0; t < step.rows; ++t)
        read_numbers(step.embedded, spec_.numbers, std::ptrdiff_t{t} * spec_.hidden, spec_.hidden, x_.row(t));
}

void Decoder::cut_cache() {
    for (Cut& cut : cuts_) {
        cut.begin.clear();
        cut.chunks.clear();
        cut.before.clear();
        cut.total = 0;
        for (int t = 0; t < step_.rows; ++t) {
            int begin = static_cast<int>(step_.first[t]);
            if (cut.window > 0) begin = std::max(begin, step_.length + 1 - cut.window);
            const int chunks = (step_.length + 1 - begin + kAttentionChunk - 1) / kAttentionChunk;
            cut.begin.push_back(begin);
            cut.chunks.push_back(chunks);
            cut.before.push_back(cut.total);
            cut.total += chunks;
        }
    }
}

void Decoder::make_buffers() {
    const int rows = step_.rows;
    std::ptrdiff_t qkv = 0, mlp = 0, router = 0, pieces = 0, group = 0, head_dim = 0;
    for (std::size_t l = 0; l < spec_.layers.size(); ++l) {
        const DecoderLayer& layer = spec_.layers[l];
        const AttentionSpec& a = layer.attention;
        qkv = std::max<std::ptrdiff_t>(qkv, qkv_width(a));
        if (layer.mlp) mlp = std::max<std::ptrdiff_t>(mlp, 2 * layer.mlp->gate.matrix.rows);
        if (layer.router) router = std::max<std::ptrdiff_t>(router, layer.rule.classes);
        pieces = std::max<std::ptrdiff_t>(pieces, std::ptrdiff_t{cuts_[size(cut_of_layer_[l])].total} * a.kv_heads);
        group = std::max<std::ptrdiff_t>(group, a.heads / a.kv_heads);
        head_dim = std::max<std::ptrdiff_t>(head_dim, a.head_dim);
    }
    for (ActivationRows* buffer : {&x_, &normed_, &attended_, &acted_}) buffer->set_rows(rows);
    qkv_.want(size(rows * qkv));
    projected_.want(size(rows * x_.stride()));
    gate_up_.want(size(rows * mlp));
    shared_.want(size(rows * x_.stride()));
    shared_gate_.want(size(rows));
    router_.want(size(rows * router));
    scratch_.want(size(rows * 2 * router));
    partial_.want(size(pieces * group * head_dim));
    partial_max_.want(size(pieces * group));
    partial_sum_.want(size(pieces * group));
    if (spec_.numbers != Format::f32) logits_.want(size(std::ptrdiff_t{rows} * spec_.head.matrix.rows));
}

void Decoder::find_angles() {
    const std::size_t half = spec_.inverse_frequencies.size();
    cosine_.resize(size(step_.rows) * half);
    sine_.resize(cosine_.size());
    const auto rounded = [&](float x) {  // as the model does, to its number format
        if (spec_.numbers == Format::bf16) return bf16_to_float(float_to_bf16(x));
        return spec_.numbers == Format::f16 ? f16_to_float(float_to_f16(x)) : x;
    };
    for (std::size_t t = 0; t < size(step_.rows); ++t) {
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
    attention(layer, team);
    network(layer, team, together);
}

// normed_ = norm(x_), with its int8 forms.
void Decoder::normalise(const Norm& norm, Team team) {
    const int blocks = normed_.blocks();
    const Range mine = share(step_.rows * blocks, 1, team.worker, team.workers);
    int known = -1;
    float inverse = 0.0f;
    for (int i = mine.begin; i < mine.end; ++i) {
        const int t = i / blocks, begin = i % blocks * ActivationRows::block;
        if (t != known) inverse = inverse_rms(x_.row(t), spec_.hidden, norm.eps);
        known = t;
        const int count = std::min(ActivationRows::block, spec_.hidden - begin);
        scale_by_norm(norm, x_.row(t) + begin, inverse, begin, count, normed_.row(t) + begin);
        normed_.quantize(t, i % blocks, spec_.hidden);
    }
    barrier();
}

// Products, and the meeting behind them. The next products use another counter, so that this one can be set back.
void Decoder::multiply_all(const Product* products, int count, Team team, int counter) {
    multiply(products, count, team, next_[counter]);
    barrier();
    if (team.worker == 0) next_[counter].store(0, std::memory_order_relaxed);
}

void Decoder::attention(int layer, Team team) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    const AttentionSpec& a = l.attention;
    normalise(l.attention_norm, team);
    const int width = qkv_width(a);
    float* q = qkv_.data();
    const Product products[] = {{&a.q, &normed_, q, width, nullptr},
                                {&a.k, &normed_, q + a.q.matrix.rows, width, nullptr},
                                {&a.v, &normed_, q + a.q.matrix.rows + a.k.matrix.rows, width, nullptr}};
    multiply_all(products, 3, team, 0);
    attend(layer, team);
    barrier();
    merge(layer, team);
    barrier();
    const Product output{&a.o, &attended_, projected_.data(), x_.stride(), x_.data()};
    multiply_all(&output, 1, team, 1);
}

Decoder::Piece Decoder::piece_at(const Cut& cut, int kv_heads, int index) const {
    Piece piece;
    while (piece.row + 1 < step_.rows && index >= cut.before[size(piece.row) + 1] * kv_heads) ++piece.row;
    const std::size_t row = size(piece.row);
    const int inside = index - cut.before[row] * kv_heads;
    const int chunk = inside % cut.chunks[row];
    piece.head = inside / cut.chunks[row];
    piece.begin = cut.begin[row] + chunk * kAttentionChunk;
    piece.end = std::min(piece.begin + kAttentionChunk, step_.length + 1);
    piece.newest = chunk + 1 == cut.chunks[row];
    return piece;
}

void Decoder::attend(int layer, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const Cut& cut = cuts_[size(cut_of_layer_[size(layer)])];
    const int group = a.heads / a.kv_heads;
    // Rotated queries of one group, one head more for what enters the cache, the scores of a chunk.
    static thread_local std::vector<float> room;
    room.resize(size((group + 1) * a.head_dim + group * kAttentionChunk));
    const Range mine = share(cut.total * a.kv_heads, 1, team.worker, team.workers);
    int row = -1, head = -1;
    AllHeads q, k;
    for (int i = mine.begin; i < mine.end; ++i) {
        const Piece piece = piece_at(cut, a.kv_heads, i);
        if (piece.row != row) {
            q = all_heads(a.q_norm, qkv_.data() + std::ptrdiff_t{piece.row} * qkv_width(a), a.q.matrix.rows, a.head_dim);
            k = all_heads(a.k_norm, q.x + a.q.matrix.rows, a.k.matrix.rows, a.head_dim);
        }
        if (piece.row != row || piece.head != head)
            for (int g = 0; g < group; ++g)
                prepare_head(a, q, piece.head * group + g, piece.row, room.data() + g * a.head_dim);
        row = piece.row;
        head = piece.head;
        if (piece.newest) store_new(layer, piece, k, room.data() + group * a.head_dim);
        attend_piece(layer, piece, i, room.data());
    }
}

Decoder::AllHeads Decoder::all_heads(const std::optional<Norm>& norm, const float* x, int width, int head_dim) {
    AllHeads heads{x, norm ? &*norm : nullptr, norm && norm->size != head_dim, 0.0f};
    if (heads.together) heads.inverse = inverse_rms(x, width, norm->eps);
    return heads;
}

// One head of the queries or keys of a row: norm, clipping, rotation.
void Decoder::prepare_head(const AttentionSpec& a, const AllHeads& heads, int head, int row, float* out) const {
    const int n = a.head_dim;
    const float* x = heads.x + std::ptrdiff_t{head} * n;
    std::copy_n(x, n, out);
    if (heads.norm != nullptr) {
        const float inverse = heads.together ? heads.inverse : inverse_rms(x, n, heads.norm->eps);
        scale_by_norm(*heads.norm, x, inverse, heads.together ? head * n : 0, n, out);
    }
    if (std::isfinite(a.clip)) clip(out, n, a.clip);
    const std::size_t half = spec_.inverse_frequencies.size();
    rotate(out, cosine_.data() + size(row) * half, sine_.data() + size(row) * half, static_cast<int>(half));
}

void Decoder::store_new(int layer, const Piece& piece, const AllHeads& k, float* room) const {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const CacheRows& cache = step_.cache[size(layer)];
    const int n = a.head_dim, bytes = spec_.numbers == Format::f32 ? 4 : 2;
    const float* v = k.x + a.k.matrix.rows + std::ptrdiff_t{piece.head} * n;
    const std::int64_t at = ((std::int64_t{piece.row} * a.kv_heads + piece.head) * cache.capacity + step_.length) * n * bytes;
    prepare_head(a, k, piece.head, piece.row, room);
    write_numbers(room, n, spec_.numbers, reinterpret_cast<char*>(cache.keys) + at);
    std::copy_n(v, n, room);
    if (std::isfinite(a.clip)) clip(room, n, a.clip);
    write_numbers(room, n, spec_.numbers, reinterpret_cast<char*>(cache.values) + at);
}

void Decoder::attend_piece(int layer, const Piece& piece, int index, float* room) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const CacheRows& cache = step_.cache[size(layer)];
    const int group = a.heads / a.kv_heads, bytes = spec_.numbers == Format::f32 ? 4 : 2;
    const std::int64_t at =
        ((std::int64_t{piece.row} * a.kv_heads + piece.head) * cache.capacity + piece.begin) * a.head_dim * bytes;
    AttentionChunk chunk;
    chunk.q = room;
    chunk.keys = reinterpret_cast<const char*>(cache.keys) + at;
    chunk.values = reinterpret_cast<const char*>(cache.values) + at;
    chunk.format = spec_.numbers;
    chunk.group = group;
    chunk.head_dim = a.head_dim;
    chunk.positions = piece.end - piece.begin;
    chunk.scaling = a.scaling;
    chunk.scores = room + (group + 1) * a.head_dim;
    chunk.acc = partial_.data() + std::ptrdiff_t{index} * group * a.head_dim;
    chunk.max = partial_max_.data() + std::ptrdiff_t{index} * group;
    chunk.sum = partial_sum_.data() + std::ptrdiff_t{index} * group;
    gangline::attend(chunk);
}

// attended_ = the chunks of every head, merged in ascending order, with its int8 forms.
void Decoder::merge(int layer, Team team) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    // Whole heads that are whole blocks of the int8 forms.
    const int heads = ActivationRows::block / std::gcd(ActivationRows::block, a.head_dim);
    const int parts = (a.heads + heads - 1) / heads, blocks = heads * a.head_dim / ActivationRows::block;
    const Range mine = share(step_.rows * parts, 1, team.worker, team.workers);
    for (int i = mine.begin; i < mine.end; ++i) {
        const int row = i / parts, part = i % parts;
        for (int h = part * heads; h < std::min((part + 1) * heads, a.heads); ++h) merge_head(layer, row, h);
        for (int b = part * blocks; b < std::min((part + 1) * blocks, attended_.blocks()); ++b)
            attended_.quantize(row, b, attended_.columns());
    }
}

void Decoder::merge_head(int layer, int row, int head) {
    const AttentionSpec& a = spec_.layers[size(layer)].attention;
    const Cut& cut = cuts_[size(cut_of_layer_[size(layer)])];
    const int group = a.heads / a.kv_heads, n = a.head_dim;
    const int chunks = cut.chunks[size(row)];
    const std::ptrdiff_t first = std::ptrdiff_t{cut.before[size(row)]} * a.kv_heads + head / group * chunks;
    const auto slot = [&](int c) { return (first + c) * group + head % group; };
    float top = a.sinks != nullptr ? a.sinks[head] : -std::numeric_limits<float>::infinity();
    for (int c = 0; c < chunks; ++c) top = std::max(top, partial_max_.data()[slot(c)]);
    float total = a.sinks != nullptr ? std::exp(a.sinks[head] - top) : 0.0f;
    float* out = attended_.row(row) + std::ptrdiff_t{head} * n;
    std::fill_n(out, n, 0.0f);
    for (int c = 0; c < chunks; ++c) {
        const float weight = std::exp(partial_max_.data()[slot(c)] - top);
        total += weight * partial_sum_.data()[slot(c)];
        const float* acc = partial_.data() + slot(c) * n;
        for (int d = 0; d < n; ++d) out[d] += weight * acc[d];
    }
    const float inverse = 1.0f / total;
    for (int d = 0; d < n; ++d) out[d] *= inverse;
}

void Decoder::network(int layer, Team team, bool together) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    normalise(l.mlp_norm, team);
    Product products[4];
    int count = 0;
    if (l.router) products[count++] = {&*l.router, &normed_, router_.data(), l.rule.classes, nullptr};
    if (l.shared_gate) products[count++] = {&*l.shared_gate, &normed_, shared_gate_.data(), 1, nullptr};
    const int width = l.mlp ? l.mlp->gate.matrix.rows : 0;
    if (l.mlp) {
        products[count++] = {&l.mlp->gate, &normed_, gate_up_.data(), 2 * width, nullptr};
        products[count++] = {&l.mlp->up, &normed_, gate_up_.data() + width, 2 * width, nullptr};
    }
    multiply_all(products, count, team, 0);
    if (l.router) choose(layer, team);
    // One row's choice is the first worker's, who goes on with it: then nobody else has to wait for it here.
    if (!l.mlp && step_.rows == 1 && together) return;
    if (l.mlp) {
        const int blocks = (width + ActivationRows::block - 1) / ActivationRows::block;
        const Range mine = share(step_.rows * blocks, 1, team.worker, team.workers);
        for (int i = mine.begin; i < mine.end; ++i) {
            const int t = i / blocks, begin = i % blocks * ActivationRows::block;
            const float* gate = gate_up_.data() + std::ptrdiff_t{t} * 2 * width + begin;
            const int n = std::min(ActivationRows::block, width - begin);
            kernels().rows.gate(l.mlp->activation, gate, gate + width, 1, acted_.row(t) + begin, n);
            acted_.quantize(t, i % blocks, width);
        }
        barrier();
        float* residual = l.router ? nullptr : x_.data();
        const Product down{&l.mlp->down, &acted_, shared_.data(), x_.stride(), residual};
        multiply_all(&down, 1, team, 1);
        return;
    }
    barrier();
}

void Decoder::choose(int layer, Team team) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    const Range mine = step_.rows == 1 ? Range{0, team.worker == 0 ? 1 : 0} : share(step_.rows, 1, team.worker, team.workers);
    const std::ptrdiff_t first = routed_before_[size(layer)] * step_.rows;
    for (int t = mine.begin; t < mine.end; ++t) {
        const std::ptrdiff_t at = first + std::ptrdiff_t{t} * l.rule.k;
        route(l.rule, router_.data() + std::ptrdiff_t{t} * l.rule.classes,
              scratch_.data() + std::ptrdiff_t{t} * 2 * l.rule.classes, step_.ids + at, step_.weights + at);
        std::copy_n(normed_.row(t), spec_.hidden, step_.moe_input + std::ptrdiff_t{t} * spec_.hidden);
    }
}

void Decoder::back(int layer, const float* moe_output) {
    for (int t = 0; t < step_.rows; ++t)
        add_output(layer, t, 0, spec_.hidden, moe_output + std::ptrdiff_t{t} * spec_.hidden);
}

void Decoder::add_output(int layer, int row, int begin, int count, const float* y) {
    const DecoderLayer& l = spec_.layers[size(layer)];
    float* x = x_.row(row) + begin;
    if (!l.mlp) {
        for (int d = 0; d < count; ++d) x[d] += y[d];
        return;
    }
    const float* shared = shared_.data() + row * x_.stride() + begin;
    const float scale = l.shared_gate ? 1.0f / (1.0f + std::exp(-shared_gate_.data()[row])) : 1.0f;
    for (int d = 0; d < count; ++d) x[d] += y[d] + scale * shared[d];
}

void Decoder::head() {
    parallel([this](int worker, int workers) { head({worker, workers}); });
}

void Decoder::head(Team team) {
    const int classes = spec_.head.matrix.rows;
    const bool plain = spec_.numbers == Format::f32;
    float* logits = plain ? static_cast<float*>(step_.logits) : logits_.data();
    normalise(spec_.final_norm, team);
    const Product product{&spec_.head, &normed_, logits, classes, nullptr};
    multiply_all(&product, 1, team, 1);
    if (plain) return;
    const Range mine = share(classes, 64, team.worker, team.workers);
    for (int t = 0; t < step_.rows; ++t) {
        const std::ptrdiff_t at = std::ptrdiff_t{t} * classes + mine.begin;
        write_numbers(logits + at, mine.end - mine.begin, spec_.numbers, static_cast<std::uint16_t*>(step_.logits) + at);
    }
}

}  // namespace gangline
