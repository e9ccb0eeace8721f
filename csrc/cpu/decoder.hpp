// One step of the common skeleton of a MoE transformer: S new tokens for each of B sequences, S = 1 while it decodes.
//
//   x = the token's embedding
//   each layer: x += o(attention(norm(x))); x += experts(norm(x)) + shared(norm(x))  [or a dense network]
//   logits = head(norm(x))
//
// Arithmetic is fp32; keys and values are rounded to the model's number format as they enter the cache. The experts are
// computed by somebody else between front() and back(), or by the step itself in step_all(). What a token gets depends on the
// tokens before it in its sequence alone: a prompt gives the same bits in one step, in several, and token by token. So the
// last layer of a prompt may be a step of the last tokens, which are all that the logits need of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "attention.hpp"
#include "decode_rows.hpp"
#include "experts.hpp"
#include "gates.hpp"
#include "norm.hpp"
#include "routing.hpp"

namespace gangline {

struct AttentionSpec {
    Linear q, k, v, o;
    int heads = 0, kv_heads = 0, head_dim = 0;
    float scaling = 1.0f;
    int window = 0;  // positions seen, the token itself included; 0: all
    std::optional<Norm> q_norm, k_norm;  // over a head, or over all heads together, by their size
    float clip = std::numeric_limits<float>::infinity();  // of queries, keys and values
    const float* sinks = nullptr;        // [heads], logits that take part in the softmax only
};

struct MlpSpec {
    Linear gate, up, down;
    Gate activation;
};

struct DecoderLayer {
    Norm attention_norm;
    AttentionSpec attention;
    Norm mlp_norm;
    std::optional<Linear> router;      // none: a dense layer
    RouterRule rule;
    std::optional<MlpSpec> mlp;        // the dense network, or the shared expert of a MoE layer
    std::optional<Linear> shared_gate;  // one row: the shared expert is scaled by the sigmoid of its product
};

struct DecoderSpec {
    int hidden = 0;
    Format numbers = Format::f32;  // of embeddings, the cache and the logits: the model's number format
    Norm final_norm;
    Linear head;
    std::vector<float> inverse_frequencies;  // [rotated dimensions / 2]
    float rope_scaling = 1.0f;               // of cosines and sines
    std::vector<DecoderLayer> layers;
};

// Keys and values of one layer: [rows, kv_heads, capacity, head_dim] each.
struct CacheRows {
    std::uint16_t* keys = nullptr;  // or float*, by DecoderSpec::numbers
    std::uint16_t* values = nullptr;
    std::int64_t capacity = 0;
};

// What one step reads and writes; pointers stay the caller's. Its rows are the tokens of one sequence after another's. L counts
// MoE layers here.
struct Step {
    int sequences = 0;
    int tokens = 1;                           // of each
    const void* embedded = nullptr;           // [rows, hidden] in DecoderSpec::numbers
    const std::int64_t* positions = nullptr;  // [rows], for the rotary embedding
    const std::int64_t* first = nullptr;      // [sequences], first cache position that a token sees: padding lies before it
    int length = 0;                           // positions in the cache before this step
    bool last_only = false;                   // of other than each sequence's last token, the last layer makes keys and values only
    std::vector<CacheRows> cache;             // one for each layer
    float* moe_input = nullptr;               // [rows, hidden]
    std::int64_t* ids = nullptr;              // [L, rows, k], layer after layer; with last_only, [sequences, k] of the model's last
    float* weights = nullptr;                 // the same
    void* logits = nullptr;                   // [sequences, vocabulary] of the last tokens in DecoderSpec::numbers

    int rows() const { return sequences * tokens; }
};

// All experts of a MoE layer, by id; they own nothing.
struct LayerExperts {
    ExpertsLayer layer;
    std::vector<Expert> experts;
};

class Decoder {
public:
    explicit Decoder(DecoderSpec spec);
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const DecoderSpec& spec() const { return spec_; }
    // The residual stream [rows, hidden], rows `stride` floats apart.
    float* hidden() const { return x_.data(); }
    std::ptrdiff_t hidden_stride() const { return x_.stride(); }

    // Takes the step's pointers and reads the embeddings.
    void begin(const Step& step);
    // Attention of a layer, its router and shared expert; a dense layer as a whole.
    void front(int layer);
    // Adds the experts' output [rows, hidden] of the MoE layer that front() was last called for.
    void back(const float* moe_output);
    void head();

    // Experts of all MoE layers for step_all(), or none. Throws std::invalid_argument where they do not fit.
    void set_experts(std::vector<LayerExperts> experts);
    // All layers and the head, in one parallel call. Gives the bits that front(), the native experts and back() give.
    void step_all();

    // Rows that everything but the experts takes at a time: bounds the memory of a step. 0: as many as fit into some megabytes.
    void set_block_rows(int rows) { asked_block_rows_ = rows; }
    // Gives the memory of steps back; the next step takes what it needs.
    void release();

private:
    // Some rows of the step: `count` of them, `step` apart.
    struct Rows {
        int begin = 0, count = 0, step = 1;
    };
    // What one token sees of the cache: positions [begin, end), in chunks that are counted from `anchor`. Padding sees itself.
    struct Sight {
        int anchor = 0, begin = 0, end = 0;
        int first_chunk() const { return (begin - anchor) / kAttentionChunk; }
        int last_chunk() const { return (end - 1 - anchor) / kAttentionChunk; }
    };
    // How the visible part of the cache is cut for layers with one window, where each sequence has one new token.
    struct Cut {
        int window = 0;
        std::vector<Sight> sight;  // [rows]
        std::vector<int> before;   // [rows + 1] chunks of the rows before
    };
    // One chunk of one sequence and key/value head.
    struct Piece {
        int row = 0, head = 0, begin = 0, end = 0;
        bool newest = false;  // holds the token's own position
    };
    // Neighbouring tokens [begin, end) of one sequence's new ones, which attend together.
    struct Tile {
        int sequence = 0, begin = 0, end = 0;
    };
    // Queries or keys of one row as the projection gave them, and their norm.
    struct AllHeads {
        const float* x = nullptr;
        const Norm* norm = nullptr;
        bool together = false;  // one norm over all heads, whose factor is `inverse`
        float inverse = 0.0f;
    };

    void count_routed();
    void make_buffers();
    int block_rows(std::size_t bytes_of_row) const;
    void want_partials();
    void cut_cache();
    void find_angles();
    Sight sight(int sequence, int position, int window) const;

    // Parts of a layer; every worker runs them, and they meet at barriers.
    void normalise(const Norm& norm, Rows rows, Team team);
    void multiply_all(const Product* products, int count, Team team, int counter);
    void attention(int layer, Rows block, Team team);
    // `together`: the same parallel call goes on with the layer's experts.
    void network(int layer, Rows block, Team team, bool together);
    void choose(int layer, Rows block, Team team);
    void front(int layer, Team team, bool together);
    void store_all(int layer, Team team);
    void keep_last_tokens(int layer);
    void head(Team team);
    void experts(int layer, Team team);
    void group_pairs(int layer);
    void prepare_run(int layer, int workers);
    bool in_runs(int k) const;
    void want_sums();
    void add_pairs(int k, int row, int column, int count, float* sum) const;
    // x_ += y, columns [begin, begin + count) of one row; y begins at that column.
    void add_output(int row, int begin, int count, const float* y);

    // Queries and keys on their way to attention (decoder_attention.cpp).
    static AllHeads all_heads(const std::optional<Norm>& norm, const float* x, int width, int head_dim);
    void prepare_head(const AttentionSpec& a, const AllHeads& heads, int head, int row, float* out) const;
    void store_new(int layer, int row, int head, const AllHeads& k, float* room) const;
    // One new token a sequence: chunks of the cache are computed apart, then merged.
    Piece piece_at(const Cut& cut, Rows block, int kv_heads, int index) const;
    void attend_pieces(int layer, Rows block, Team team);
    void attend_piece(int layer, const Piece& piece, int index);
    void merge(int layer, Rows block, Team team);
    void merge_head(int layer, Rows block, int t, int head);
    // Several: tiles of neighbouring tokens go through the chunks together.
    void store_rows(int layer, Rows block, Team team) const;
    void prepare_queries(int layer, Rows block, Team team);
    Tile tokens_of(Rows block, int sequence) const;
    int padding_of(const Tile& tokens) const;
    int tiles_of(Rows block, int sequence, int tile_tokens) const;
    Tile tile_at(Rows block, int tile_tokens, int index) const;
    void attend_tiles(int layer, Rows block, Team team);
    void attend_tile(int layer, Rows block, const Tile& tile, int head);
    const char* cached(const void* cache, int layer, int sequence, int head, int position) const;

    DecoderSpec spec_;
    Step step_;
    std::vector<std::ptrdiff_t> routed_before_;  // for each layer: k of the MoE layers before it, added up
    TaskRanges products_[2];  // what the workers have taken of some products
    std::atomic<int> next_tile_{0};  // of attention
    std::vector<int> cut_of_layer_;
    std::vector<Cut> cuts_;

    int asked_block_rows_ = 0, block_rows_ = 0;
    ActivationRows x_;  // of all rows; what follows, of one block of rows
    ActivationRows normed_, attended_, acted_;
    Buffer<float> qkv_, gate_up_, shared_gate_, router_, scratch_;
    Buffer<float> logits_;
    Buffer<float> partial_, partial_max_, partial_sum_;
    std::vector<float> cosine_, sine_;  // [rows, rotated / 2]

    // Experts inside step_all(): the pairs of a layer, sorted by expert and then by row.
    std::vector<LayerExperts> experts_;  // for each layer of the model; empty without set_experts
    ExpertsRun run_;
    ExpertsCall call_;
    std::vector<int> starts_;
    std::vector<const Expert*> chosen_;
    std::vector<std::int64_t> row_of_pair_;
    std::vector<float> weight_of_pair_;
    std::vector<int> order_;           // pairs by expert
    std::vector<int> pairs_of_row_;    // [rows, k], ascending expert
    std::vector<int> filled_;          // [rows] of them while they are found
    std::vector<int> first_of_expert_;  // [classes + 1] pairs
    int run_begin_ = 0, run_end_ = 0;  // pairs that are computed together
    int next_expert_ = 0;              // first that has pairs behind the run
    Buffer<float> pair_output_;        // [pairs of a run, hidden]
    Buffer<float> sums_;               // [rows, hidden], where a layer takes several runs; zeros between layers
};

}  // namespace gangline
