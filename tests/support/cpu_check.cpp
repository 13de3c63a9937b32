// The CPU kernels without Torch, for what tests cannot do in a process with Torch in it: run them
// under sanitizers, on emulated CPUs, and on tensors between pages that must not be touched.
//
// O is compared with its definition in fp64, where every Z is a whole attention over joined keys;
// gradients with differences of that along random directions.
//
//     cpu_check [instruction set] [fp32]
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "nasa_cpu.h"

using namespace nasa::cpu;
using Doubles = std::vector<double>;

namespace {

int32_t serial(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
               void* context) {
    body(begin, end, context);
    return 0;
}

// ---------------------------------------------------------------------------------------- tensors

int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

uint16_t narrowed(float x, Type type) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if (type == Type::kBfloat16) return (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const int e = int(u >> 23 & 255) - 112;
    if (e <= 0) return u >> 16 & 0x8000;  // small numbers become 0 here
    if (e > 30) return (u >> 16 & 0x8000) | 0x7c00 | (x != x ? 0x200 : 0);
    return (u >> 16 & 0x8000) | ((u >> 13 & 0x3ff) + (e << 10) + (u >> 12 & 1));
}

double widened(uint16_t x, Type type) {
    if (type == Type::kBfloat16) {
        const uint32_t u = uint32_t{x} << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    const int e = x >> 10 & 31, m = x & 0x3ff;
    if (e == 31) return m ? NAN : x & 0x8000 ? -INFINITY : INFINITY;
    const double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return x & 0x8000 ? -v : v;
}

// Between two pages that must not be touched: the data end where the second one begins, or begin
// where the first one ends.
struct Guarded {
    char* pages;
    size_t bytes, mapped;
    char* data;

    Guarded(size_t bytes, bool at_end) : bytes(bytes) {
        const size_t page = sysconf(_SC_PAGESIZE);
        const size_t inside = (bytes + page - 1) / page * page;
        mapped = inside + 2 * page;
        pages = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (pages == MAP_FAILED) abort();
        mprotect(pages, page, PROT_NONE);
        mprotect(pages + page + inside, page, PROT_NONE);
        data = pages + page + (at_end ? inside - bytes : 0);
    }
    Guarded(const Guarded&) = delete;
    Guarded(Guarded&& x) : pages(x.pages), bytes(x.bytes), mapped(x.mapped), data(x.data) {
        x.pages = nullptr;
    }
    ~Guarded() {
        if (pages != nullptr) munmap(pages, mapped);
    }
};

struct Tensor {
    Type type;
    size_t count;
    Guarded memory;

    Tensor(Type type, size_t count, bool at_end)
        : type(type), count(count), memory(count * size_of(type), at_end) {
        memset(memory.data, 0xff, count * size_of(type));  // NaN where nothing is written
    }
    void* data() const { return memory.data; }
    double at(size_t i) const {
        if (type != Type::kFloat) {
            uint16_t bits;
            memcpy(&bits, memory.data + 2 * i, 2);
            return widened(bits, type);
        }
        float x;
        memcpy(&x, memory.data + 4 * i, 4);
        return x;
    }
    void set(size_t i, float x) {
        const uint16_t bits = narrowed(x, type);
        memcpy(memory.data + size_of(type) * i, type == Type::kFloat ? (void*)&x : (void*)&bits,
               size_of(type));
    }
    void fill(std::mt19937& random, float size = 1) {
        std::normal_distribution<float> normal;
        for (size_t i = 0; i < count; ++i) set(i, size * normal(random));
    }
    Doubles values() const {
        Doubles x(count);
        for (size_t i = 0; i < count; ++i) x[i] = at(i);
        return x;
    }
};

// ----------------------------------------------------------------------------------- in fp64

struct Case {
    int64_t b, l, h, d, n[kSegments], text_pos, text_neg;
    Rule rule;
    int64_t group = 1;  // heads of Q that look at one of K and V

    int64_t h_kv() const { return h / group; }
    // the heads of q (tensor 0), or of k and v
    int64_t heads(int tensor) const { return tensor == 0 ? h : h_kv(); }
};

// q, then k and v of each segment, then alpha, all contiguous
struct Inputs {
    Doubles x[8];
    Doubles bias[kSegments];  // [b, n]
};

double score(const Case& c, const Inputs& in, int64_t row, int s, int64_t j) {
    const int64_t b = row / (c.l * c.h), h = row % c.h;
    const double bias = in.bias[s].empty() ? 0 : in.bias[s][b * c.n[s] + j];
    if (bias == -INFINITY) return bias;
    const double* const q = &in.x[0][row * c.d];
    const double* const k = &in.x[1 + 2 * s][((b * c.n[s] + j) * c.h_kv() + h / c.group) * c.d];
    double sum = 0;
    for (int64_t i = 0; i < c.d; ++i) sum += q[i] * k[i];
    return sum / std::sqrt(double(c.d)) + bias;
}

// o += weight * softmax over the keys of `seen` times the values of `kept`
void add_attention(const Case& c, const Inputs& in, int64_t row, const std::string& seen,
                   const std::string& kept, double weight, double* o) {
    const int64_t b = row / (c.l * c.h), h = row % c.h;
    Doubles scores[kSegments];
    double largest = -INFINITY, sum = 0;
    for (int s = 0; s < kSegments; ++s) {
        if (seen.find("spn"[s]) == std::string::npos) continue;
        for (int64_t j = 0; j < c.n[s]; ++j) scores[s].push_back(score(c, in, row, s, j));
        for (double x : scores[s]) largest = std::fmax(largest, x);
    }
    if (largest == -INFINITY) return;
    for (const Doubles& some : scores) {
        for (double x : some) sum += std::exp(x - largest);
    }
    for (int s = 0; s < kSegments; ++s) {
        if (kept.find("spn"[s]) == std::string::npos) continue;
        for (size_t j = 0; j < scores[s].size(); ++j) {
            const double p = weight * std::exp(scores[s][j] - largest) / sum;
            if (p == 0) continue;
            const int64_t at = ((b * c.n[s] + j) * c.h_kv() + h / c.group) * c.d;
            const double* const v = &in.x[2 + 2 * s][at];
            for (int64_t i = 0; i < c.d; ++i) o[i] += p * v[i];
        }
    }
}

double dot(const Doubles& a, const Doubles& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

// What Z- has and Z+ has not is taken away, and the length of Z+ kept
void project(const Doubles& pos, const Doubles& neg, double alpha, double* o) {
    const double size = dot(pos, pos), t = size > 0 ? dot(neg, pos) / size : 0;
    Doubles left = pos;
    for (size_t i = 0; i < left.size(); ++i) left[i] -= alpha * (neg[i] - t * pos[i]);
    const double length = size > 0 ? std::sqrt(size / dot(left, left)) : 1;
    for (size_t i = 0; i < left.size(); ++i) o[i] = size > 0 ? length * left[i] : pos[i];
}

void add_row(const Case& c, const Inputs& in, int64_t row, Rule rule, double* o) {
    const double alpha = in.x[7][row];
    const auto add = [&](const char* seen, const char* kept, double weight) {
        add_attention(c, in, row, seen, kept, weight, o);
    };
    switch (rule) {
        case Rule::kNasa: add("sp", "sp", 1), add("sn", "sn", -alpha); break;
        case Rule::kNasaText: add("sp", "sp", 1), add("sn", "n", -alpha); break;
        case Rule::kNasaCross: add("sp", "sp", 1), add("n", "n", -alpha); break;
        case Rule::kVsf: add("spn", "sp", 1), add("spn", "n", -alpha); break;
        case Rule::kSum: add("s", "s", 1), add("p", "p", 1), add("n", "n", -alpha); break;
        case Rule::kProjected: {
            Doubles pos(c.d), neg(c.d);
            add_attention(c, in, row, "sp", "sp", 1, pos.data());
            add_attention(c, in, row, "sn", "sn", 1, neg.data());
            project(pos, neg, alpha, o);
            break;
        }
        case Rule::kNag:  // of all heads at once: `guided`
        case Rule::kPositive: add("sp", "sp", 1); break;
        case Rule::kNegative: add("sn", "sn", 1); break;
    }
}

Rule rule_of_row(const Case& c, int64_t row) {
    const int64_t l = row / c.h % c.l;
    if (l >= c.l - c.text_neg) return Rule::kNegative;
    return l >= c.l - c.text_neg - c.text_pos ? Rule::kPositive : c.rule;
}

Doubles definition(const Case& c, const Inputs& in) {
    Doubles o(c.b * c.l * c.h * c.d);
    for (int64_t row = 0; row < c.b * c.l * c.h; ++row) {
        add_row(c, in, row, rule_of_row(c, row), &o[row * c.d]);
    }
    return o;
}

// Under normalised attention guidance, in the place of Z+
void guide(const Case& c, const Inputs& in, const Nag& nag, Doubles& o) {
    for (int64_t i = 0; i < c.b * c.l; ++i) {
        if (i % c.l >= c.l - c.text_pos - c.text_neg) continue;
        double* const pos = &o[i * c.h * c.d];
        Doubles guided(c.h * c.d);
        double norms[2] = {};
        for (int64_t h = 0; h < c.h; ++h) {
            add_row(c, in, i * c.h + h, Rule::kNegative, &guided[h * c.d]);
        }
        for (size_t j = 0; j < guided.size(); ++j) {
            guided[j] = nag.scale * pos[j] - (nag.scale - 1) * guided[j];
            norms[0] += std::pow(std::fabs(pos[j]), nag.norm);
            norms[1] += std::pow(std::fabs(guided[j]), nag.norm);
        }
        for (double& x : norms) x = std::pow(x, 1.0 / nag.norm);
        const double shrink = std::fmin(1, norms[1] > 0 ? nag.tau * norms[0] / norms[1] : 1);
        const double share = in.x[7][i * c.h];
        for (size_t j = 0; j < guided.size(); ++j) {
            pos[j] = share * shrink * guided[j] + (1 - share) * pos[j];
        }
    }
}

// ------------------------------------------------------------------------------------------ a case

void require(bool holds, const char* what, double found, double allowed) {
    if (holds) return;
    printf("%s: %.3g, allowed %.3g\n", what, found, allowed);
    exit(1);
}

double distance(const Tensor& found, const Doubles& exact) {
    double error = 0, size = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        error += std::pow(found.at(i) - exact[i], 2);
        size += exact[i] * exact[i];
    }
    return std::sqrt(size > 0 ? error / size : error);
}

Rows view(const Case& c, const Tensor& y, int64_t n, int64_t heads) {
    return {y.data(), n * heads * c.d, heads * c.d, c.d};
}

// q, then k and v of each segment
std::vector<Tensor> normal_tensors(const Case& c, Type type, bool at_end, std::mt19937& random) {
    std::vector<Tensor> x;
    for (int i = 0; i < 7; ++i) {
        const int64_t rows = c.b * (i == 0 ? c.l : c.n[(i - 1) / 2]);
        x.emplace_back(type, rows * c.heads(i) * c.d, at_end);
        x.back().fill(random);
    }
    return x;
}

Call call_of(const Case& c, Type type, const std::vector<Tensor>& x) {
    Call call{};
    call.q = view(c, x[0], c.l, c.h);
    for (int s = 0; s < kSegments; ++s) {
        const Rows k = view(c, x[1 + 2 * s], c.n[s], c.h_kv());
        const Rows v = view(c, x[2 + 2 * s], c.n[s], c.h_kv());
        call.segment[s] = {k, v, {}, c.n[s]};
    }
    call.b = c.b, call.l = c.l, call.h = c.h, call.d = c.d;
    call.h_kv = c.h_kv();
    call.text_pos = c.text_pos, call.text_neg = c.text_neg;
    call.scale = 1 / std::sqrt(float(c.d)), call.rule = c.rule, call.type = type;
    return call;
}

double unit_of(Type type) {
    return type == Type::kFloat ? 3e-6 : type == Type::kHalf ? 1e-3 : 8e-3;
}

void check(const Kernels& kernels, const Case& c, Type type, bool at_end, bool with_mask,
           std::mt19937& random) {
    const int64_t rows = c.b * c.l * c.h;
    std::vector<Tensor> x = normal_tensors(c, type, at_end, random), gradients;
    for (const Tensor& like : x) gradients.emplace_back(type, like.count, at_end);
    Tensor o(type, x[0].count, at_end), grad_o(type, x[0].count, at_end);
    grad_o.fill(random);
    Tensor alpha(Type::kFloat, rows, at_end), dalpha(Type::kFloat, rows, at_end);
    alpha.fill(random, 0.5f);
    Tensor bias(Type::kFloat, c.b * c.n[kNeg], at_end);
    for (size_t i = 0; i < bias.count; ++i) bias.set(i, i % 5 == 3 ? -INFINITY : 0.1f * (i % 7));

    // what a masked row holds must not count
    for (size_t i = 0; with_mask && i < x[5].count; ++i) {
        if (bias.at(i / (c.h_kv() * c.d)) != -INFINITY) continue;
        x[5].set(i, NAN);
        x[6].set(i, INFINITY);
    }

    Call call = call_of(c, type, x);
    Inputs in;
    for (int i = 0; i < 7; ++i) in.x[i] = x[i].values();
    in.x[7] = alpha.values();
    if (with_mask) {
        call.segment[kNeg].mask = {bias.data(), c.n[kNeg], 1, MaskType::kFloat};
        in.bias[kNeg] = bias.values();
    }
    call.alpha_map = static_cast<const float*>(alpha.data());
    call.alpha_stride_b = c.l * c.h, call.alpha_stride_l = c.h, call.alpha_stride_h = 1;

    const Threads threads{serial, 1};
    if (!kernels.forward(call, {o.data(), nullptr, nullptr}, threads)) exit(1);
    Gradients to{};
    to.grad_o = view(c, grad_o, c.l, c.h);
    to.dq = gradients[0].data();
    for (int s = 0; s < kSegments; ++s) {
        to.dk[s] = gradients[1 + 2 * s].data();
        to.dv[s] = gradients[2 + 2 * s].data();
    }
    to.dalpha = static_cast<float*>(dalpha.data());
    if (!kernels.backward(call, to, threads)) exit(1);

    const double unit = unit_of(type);
    const double of_o = distance(o, definition(c, in));
    require(of_o <= unit, "O", of_o, unit);

    std::normal_distribution<double> normal;
    const Doubles go = grad_o.values();
    std::vector<Doubles> found, direction;
    for (int i = 0; i < 8; ++i) {
        found.push_back(i < 7 ? gradients[i].values() : dalpha.values());
        const Doubles& g = found.back();
        // each gradient counts alike, whatever its size
        const double size = std::sqrt(dot(g, g)) + 1e-3;
        direction.emplace_back(g.size());
        for (double& y : direction.back()) y = normal(random) / size;
    }
    // of the tensors [begin, end): the gradients along the direction, and a difference of O
    const auto error_of = [&](int begin, int end) {
        const double step = 1e-5;
        Inputs more = in, less = in;
        double along = 0;
        for (int i = begin; i < end; ++i) {
            along += dot(found[i], direction[i]);
            for (size_t j = 0; j < found[i].size(); ++j) {
                more.x[i][j] += step * direction[i][j];
                less.x[i][j] -= step * direction[i][j];
            }
        }
        const double exact =
            (dot(go, definition(c, more)) - dot(go, definition(c, less))) / (2 * step);
        return std::fabs(along - exact);
    };
    // an error is a sum over a random direction: of its size times a normal number. All at once, for
    // the definition is what takes the time here; one by one only to name the one that is wrong.
    const double worst = error_of(0, 8);
    for (int i = 0; i < 8 && !(worst <= 8 * unit); ++i) {
        const double error = error_of(i, i + 1);
        const std::string name = "gradient " + std::to_string(i);
        require(error <= 8 * unit, name.c_str(), error, 8 * unit);
    }
    require(worst <= 8 * unit, "gradients", worst, 8 * unit);
    printf("%s b%d l%d h%d d%d n%d+%d+%d text %d+%d rule %d type %d mask %d: O %.1e, gradients %.1e\n",
           kernels.name, int(c.b), int(c.l), int(c.h), int(c.d), int(c.n[0]), int(c.n[1]),
           int(c.n[2]), int(c.text_pos), int(c.text_neg), int(c.rule), int(type), with_mask, of_o,
           worst);
}

// Z+ and Z- apart, each without the queries of the other text
void check_pair(const Kernels& kernels, const Case& c, bool at_end, std::mt19937& random) {
    const auto make = [&](int64_t n) {
        return Tensor(Type::kFloat, c.b * n * c.h * c.d, at_end);
    };
    const std::vector<Tensor> x = normal_tensors(c, Type::kFloat, at_end, random);
    Inputs in;
    for (int i = 0; i < 7; ++i) in.x[i] = x[i].values();
    in.x[7].resize(c.b * c.l * c.h);
    Call call = call_of(c, Type::kFloat, x);
    call.alpha = 1;
    const Tensor z_pos = make(c.l - c.text_neg), z_neg = make(c.l - c.text_pos);
    if (!kernels.forward(call, {nullptr, z_pos.data(), z_neg.data()}, {serial, 1})) exit(1);

    Doubles pos, neg;
    const int64_t image = c.l - c.text_pos - c.text_neg;
    for (int64_t row = 0; row < c.b * c.l * c.h; ++row) {
        const int64_t l = row / c.h % c.l;
        Doubles o(c.d);
        if (l < image + c.text_pos) {
            add_row(c, in, row, Rule::kPositive, o.data());
            pos.insert(pos.end(), o.begin(), o.end());
        }
        if (l < image || l >= image + c.text_pos) {
            o.assign(c.d, 0);
            add_row(c, in, row, Rule::kNegative, o.data());
            neg.insert(neg.end(), o.begin(), o.end());
        }
    }
    const double error = std::fmax(distance(z_pos, pos), distance(z_neg, neg));
    require(error <= 3e-6, "Z+ and Z-", error, 3e-6);
    printf("%s Z+ and Z- apart: %.1e\n", kernels.name, error);
}

// Normalised attention guidance: a share for each query, 0 for some
void check_nag(const Kernels& kernels, const Case& c, Type type, int norm, bool at_end,
               std::mt19937& random) {
    const std::vector<Tensor> x = normal_tensors(c, type, at_end, random);
    Tensor share(Type::kFloat, c.b * c.l, at_end), o(type, x[0].count, at_end);
    for (size_t i = 0; i < share.count; ++i) share.set(i, i % 3 == 1 ? 0.f : 0.1f * (i % 7));
    Call call = call_of(c, type, x);
    call.alpha_map = static_cast<const float*>(share.data());
    call.alpha_stride_b = c.l, call.alpha_stride_l = 1;
    // of G that are not shortened there are as many as of those that are
    call.nag = {3.f, norm == 1 ? 3.1f : 2.9f, norm};
    Inputs in;
    for (int i = 0; i < 7; ++i) in.x[i] = x[i].values();
    for (int64_t i = 0; i < c.b * c.l * c.h; ++i) in.x[7].push_back(share.at(i / c.h));
    Doubles exact = definition(c, in);
    guide(c, in, call.nag, exact);
    if (!kernels.forward(call, {o.data(), nullptr, nullptr}, {serial, 1})) exit(1);
    const double error = distance(o, exact);
    require(error <= unit_of(type), "NAG", error, unit_of(type));
    printf("%s NAG l%d norm %d type %d: %.1e\n", kernels.name, int(c.l), norm, int(type), error);
}

// Rows that must be Z+ bit for bit: those with equal prompts, and those with alpha 0, where the
// values of the negative prompt are NaN.
void check_exact(const Kernels& kernels, Case c, Type type, std::mt19937& random) {
    c.n[kNeg] = c.n[kPos];
    std::vector<Tensor> x = normal_tensors(c, type, true, random);
    Tensor alpha(Type::kFloat, c.l * c.h, true), o(type, x[0].count, true);
    Tensor plain(type, x[0].count, true);
    for (int is_equal = 0; is_equal < 2; ++is_equal) {
        for (int i = 0; i < 2; ++i) {
            const size_t bytes = x[3 + i].count * size_of(type);
            memcpy(x[5 + i].data(), x[3 + i].data(), bytes);
        }
        alpha.fill(random, 3);
        if (!is_equal) {
            for (size_t i = 0; i < x[6].count; ++i) x[6].set(i, NAN);
            for (size_t i = 0; i < alpha.count; ++i) alpha.set(i, 0);
        }
        Call call = call_of(c, type, x);
        call.alpha_map = static_cast<const float*>(alpha.data());
        call.alpha_stride_l = c.h, call.alpha_stride_h = 1;
        call.nag = {3.f, 2.f, 1};
        const Threads threads{serial, 1};
        if (!kernels.forward(call, {o.data(), nullptr, nullptr}, threads)) exit(1);
        call.rule = Rule::kPositive;
        if (!kernels.forward(call, {plain.data(), nullptr, nullptr}, threads)) exit(1);
        // NAG of equal prompts is a sum of two shares of them
        if (c.rule == Rule::kNag && is_equal) continue;
        const bool is_same = memcmp(o.data(), plain.data(), o.count * size_of(type)) == 0;
        require(is_same, is_equal ? "equal prompts" : "alpha 0", distance(o, plain.values()), 0);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const Kernels* const found = kernels(argc > 1 ? argv[1] : nullptr);
    if (found == nullptr) {
        printf("this CPU does not have %s\n", argv[1]);
        return 2;
    }
    std::vector<Type> types = {Type::kFloat, Type::kHalf, Type::kBfloat16};
    if (argc > 2) types.resize(1);
    std::mt19937 random(1);
    const Case cases[] = {
        {1, 65, 2, 64, {0, 77, 77}, 0, 0, Rule::kSum},
        {2, 33, 1, 40, {0, 77, 50}, 0, 0, Rule::kSum},
        {1, 49, 1, 17, {0, 200, 9}, 0, 0, Rule::kSum},
        {2, 7, 2, 3, {0, 5, 150}, 0, 0, Rule::kSum},
        {1, 1, 1, 1, {0, 1, 1}, 0, 0, Rule::kSum},
        {1, 20, 1, 256, {0, 9, 31}, 0, 0, Rule::kSum},
        {1, 21, 1, 160, {0, 0, 31}, 0, 0, Rule::kSum},
        {1, 30, 2, 33, {40, 7, 9}, 2, 5, Rule::kNasa},
        {1, 37, 1, 64, {130, 12, 16}, 4, 0, Rule::kNasaText},
        {2, 19, 1, 72, {20, 150, 16}, 0, 3, Rule::kNasaCross},
        {1, 50, 1, 128, {24, 12, 0}, 12, 8, Rule::kVsf},
        {1, 9, 1, 16, {24, 12, 8}, 5, 4, Rule::kSum},
        {1, 65, 2, 64, {0, 77, 77}, 0, 0, Rule::kProjected},
        {2, 33, 1, 40, {0, 200, 9}, 0, 0, Rule::kProjected},
        {1, 5, 1, 3, {0, 1, 5}, 0, 0, Rule::kProjected},
        {1, 11, 1, 19, {0, 0, 5}, 0, 0, Rule::kProjected},
        {1, 37, 2, 33, {140, 12, 16}, 4, 3, Rule::kProjected},
        {1, 9, 1, 18, {24, 0, 8}, 0, 4, Rule::kProjected},
        {2, 21, 4, 20, {0, 12, 9}, 0, 0, Rule::kSum, 2},
        {1, 19, 6, 17, {14, 7, 9}, 3, 2, Rule::kNasa, 3},
        {1, 9, 4, 16, {0, 7, 5}, 0, 0, Rule::kProjected, 2},
    };
    for (const Case& c : cases) {
        for (Type type : types) {
            check(*found, c, type, true, false, random);
            check(*found, c, type, false, c.n[kNeg] > 0, random);
        }
    }
    for (Type type : types) {
        for (int norm : {1, 2}) {
            // many blocks, each a task; and few, whose heads are tasks
            check_nag(*found, {2, 130, 3, 24, {0, 17, 9}, 0, 0, Rule::kNag}, type, norm, true, random);
            check_nag(*found, {1, 19, 2, 5, {13, 7, 9}, 3, 0, Rule::kNag}, type, norm, false, random);
            check_nag(*found, {1, 19, 4, 5, {0, 7, 9}, 0, 0, Rule::kNag, 2}, type, norm, true, random);
        }
        for (Rule rule : {Rule::kProjected, Rule::kNag}) {
            check_exact(*found, {1, 50, 2, 21, {0, 77, 77}, 0, 0, rule}, type, random);
            check_exact(*found, {1, 50, 2, 21, {30, 12, 12}, 2, 0, rule}, type, random);
        }
    }
    check_pair(*found, cases[7], true, random);
    return 0;
}
