// Products that have been computed before, computed again without Python. Their ops come here first: what is known, by
// where its weights lie and by all else that it depends on, runs at once; with anything else, Python's kernel goes on.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

constexpr size_t MOST_KNOWN = 4096;

using Linear = void (*)(const void* jobs, int64_t count, const void* x, void* y, int64_t rows, int threads);
using Gated = void (*)(const void* job, const void* x, const int64_t* ids, const void* weights, void* y, int64_t slots,
                       int threads);

struct Known {
    const void* run;
    std::vector<uint64_t> jobs; // all of it but inputs and result
    int64_t count, columns;     // of jobs, and of the result
    int64_t most;               // rows of x, or slots
};

using Key = c10::SmallVector<int64_t, 128>;

struct Hash {
    size_t operator()(const Key& key) const {
        uint64_t mixed = key.size();
        for (const int64_t part : key) mixed = (mixed ^ (uint64_t)part) * 0x9e3779b97f4a7c15u, mixed ^= mixed >> 29;
        return mixed;
    }
};

// Never destroyed: when the process ends, threads may still multiply, and Python is gone before C++ is.
auto& all_known = *new std::unordered_map<Key, std::shared_ptr<const Known>, Hash>;
auto& all_known_mutex = *new std::shared_mutex;
auto& libraries = *new std::vector<torch::Library>;
const int64_t* paused; // not 0 while Python has to decide; Python writes it, in any thread
thread_local const Key* asked = nullptr; // what Python's kernel is at

std::shared_ptr<const Known> find(const Key& key) {
    const std::shared_lock lock(all_known_mutex);
    const auto found = all_known.find(key);
    return found == all_known.end() ? nullptr : found->second;
}

bool is_plain(const at::Tensor& t) {
    const bool dense = t.defined() && t.layout() == c10::kStrided && t.device().is_cpu() && t.has_storage();
    return dense && !t.key_set().has(DispatchKey::Python) && !t.is_conj() && !t.is_neg();
}

bool wants_gradient(const at::Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); }

void add_text(Key& key, c10::string_view text) {
    key.push_back(text.size());
    for (size_t i = 0; i < text.size(); i += sizeof(int64_t)) {
        int64_t part = 0;
        std::memcpy(&part, text.data() + i, std::min(sizeof part, text.size() - i));
        key.push_back(part);
    }
}

// A list of tensors, by where and how they lie.
bool add_places(Key& key, const IValue& list) {
    const auto tensors = list.toListRef();
    key.push_back(tensors.size());
    for (const IValue& item : tensors) {
        const at::Tensor& t = item.toTensor();
        if (!is_plain(t) || wants_gradient(t)) return false;
        key.push_back((int64_t)t.const_data_ptr());
        key.push_back(((int64_t)t.scalar_type() << 32) + t.dim());
        key.append(t.sizes().begin(), t.sizes().end());
        key.append(t.strides().begin(), t.strides().end());
    }
    return true;
}

// All that a call depends on: of tensors that are no weights, the dtype and the last dimension. False: it is not for us.
bool add_call(Key& key, const OperatorHandle& op, c10::ArrayRef<IValue> args) {
    key.push_back((int64_t)&op.schema());
    for (const IValue& arg : args) {
        if (arg.isTensor()) {
            const at::Tensor& t = arg.toTensor();
            if (!is_plain(t) || wants_gradient(t) || !t.dim() || !t.numel()) return false;
            key.push_back(((int64_t)t.scalar_type() << 48) + t.size(-1));
        } else if (arg.isTensorList()) {
            if (!add_places(key, arg)) return false;
        } else if (arg.isIntList()) {
            const auto numbers = arg.toIntVector();
            key.push_back(numbers.size()), key.append(numbers.begin(), numbers.end());
        } else if (arg.isString()) {
            add_text(key, arg.toStringView());
        } else if (arg.isInt()) {
            key.push_back(arg.toInt());
        } else {
            return false;
        }
    }
    return true;
}

// x, planes, biases, ...
std::optional<at::Tensor> run_linear(const Known& known, c10::ArrayRef<IValue> args) {
    const at::Tensor& x = args[0].toTensor();
    const int64_t rows = x.numel() / x.size(-1);
    if (rows > known.most) return std::nullopt;
    const auto dense = x.expect_contiguous();
    c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = known.columns;
    at::Tensor y(at::detail::empty_cpu(sizes, x.options()));
    ((Linear)known.run)(known.jobs.data(), known.count, dense->const_data_ptr(), y.mutable_data_ptr(), rows,
                        at::get_num_threads());
    return y;
}

// x, ids, weights, ...
std::optional<at::Tensor> run_gated(const Known& known, c10::ArrayRef<IValue> args) {
    const at::Tensor &x = args[0].toTensor(), &ids = args[1].toTensor(), &weights = args[2].toTensor();
    if (x.dim() != 2 || ids.dim() != 2 || ids.scalar_type() != c10::kLong || ids.sizes() != weights.sizes())
        return std::nullopt;
    if (ids.size(0) != x.size(0) || ids.numel() > known.most) return std::nullopt;
    const auto dense = x.expect_contiguous(), chosen = ids.expect_contiguous(), shares = weights.expect_contiguous();
    at::Tensor y(at::detail::empty_cpu(x.sizes(), x.options()));
    ((Gated)known.run)(known.jobs.data(), dense->const_data_ptr(), chosen->const_data_ptr<int64_t>(),
                       shares->const_data_ptr(), y.mutable_data_ptr(), ids.numel(), at::get_num_threads());
    return y;
}

using Run = std::optional<at::Tensor> (*)(const Known&, c10::ArrayRef<IValue>);

// Python's kernel for an op and a dispatch key, and ours before it.
template <Run run> class First : public c10::OperatorKernel {
public:
    explicit First(const OperatorHandle& op, DispatchKey key) : python(op.getComputedKernelForDispatchKey(key)) {}

    void operator()(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
        const size_t count = op.schema().arguments().size();
        const c10::ArrayRef<IValue> args(stack->data() + stack->size() - count, count);
        // Between the kernel for gradients and the CPU's there can be a mode that wants to see the op.
        const bool next = (keys & c10::after_ADInplaceOrView_keyset).highestPriorityTypeId() == DispatchKey::CPU;
        Key key;
        const bool ours = next && !__atomic_load_n(paused, __ATOMIC_RELAXED) && add_call(key, op, args);
        if (const auto known = ours ? find(key) : nullptr)
            if (auto y = run(*known, args)) {
                torch::jit::drop(*stack, count);
                stack->emplace_back(std::move(*y));
                return;
            }
        struct Asking {
            const Key* const before = asked;
            ~Asking() { asked = before; }
        } asking;
        asked = ours ? &key : nullptr;
        python.callBoxed(op, keys, stack);
    }

private:
    const c10::SafeKernelFunction python;
};

template <Run run> void go_first(torch::Library& library, const char* name, DispatchKey key) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fxquant::") + name).c_str(), "");
    auto kernel = std::make_unique<First<run>>(op, key);
    library.impl(name, torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(std::move(kernel))));
}

} // namespace

// The ops of a kind are ours first from now on, unless the number is not 0. To be called once for each kind, with the
// same number. What went wrong, or null.
extern "C" const char* fxquant_go_first(int kind, const int64_t* unless) {
    static std::string problem;
    paused = unless;
    try {
        auto& library = libraries.emplace_back(torch::Library::IMPL, "fxquant", std::nullopt, __FILE__, __LINE__);
        if (kind == 0) {
            // Before Python's kernel for gradients as well, since who wants one is sent on to it.
            go_first<run_linear>(library, "linear", DispatchKey::AutogradCPU);
            go_first<run_linear>(library, "linear", DispatchKey::CPU);
        } else {
            go_first<run_gated>(library, "gated_experts", DispatchKey::CPU);
        }
    } catch (const std::exception& error) {
        problem = error.what();
        return problem.c_str();
    }
    return nullptr;
}

// The product that Python's kernel is at is known from now on.
extern "C" void fxquant_remember(const void* run, const void* jobs, int64_t bytes, int64_t count, int64_t columns,
                                 int64_t most) {
    if (!asked) return;
    auto known = std::make_shared<Known>(Known{run, std::vector<uint64_t>((bytes + 7) / 8), count, columns, most});
    std::memcpy(known->jobs.data(), jobs, bytes);
    const std::unique_lock lock(all_known_mutex);
    if (all_known.size() >= MOST_KNOWN) all_known.clear();
    all_known[*asked] = std::move(known);
}
