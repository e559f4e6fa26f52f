// What CubeCL's generated CUDA C++ needs of a card, for a host compiler: one cube at a time, its units as coroutines.
//
// A unit runs until it waits. Planes run one after another, each as far as the next barrier of the cube, and every other cube runs them
// (and their units) in reverse: an order that a card could have as well, and one that shows a missing barrier. What is not here
// does not compile.
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(units)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
    unsigned x, y, z;
};
static uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// Rounds to nearest even, as `__float2bfloat16_rn` does.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>> __nv_bfloat16(T value) {
        float number = float(value);
        uint32_t word;
        memcpy(&word, &number, 4);
        bool nan = number != number;
        bits = nan ? 0x7fff : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float number;
        memcpy(&number, &word, 4);
        return number;
    }
};
struct __half {
    _Float16 number;
    __half() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>> __half(T value) : number(_Float16(float(value))) {}
    operator float() const { return float(number); }
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct __half2 {
    __half x, y;
};

template <typename A, typename B> static auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return T(fmin(a, b));
    else return T(a) < T(b) ? T(a) : T(b);
}
template <typename A, typename B> static auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return T(fmax(a, b));
    else return T(a) > T(b) ? T(a) : T(b);
}
static float rsqrt(float x) { return 1.0f / sqrtf(x); }
#define __expf expf
static uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

// All shared memory of a cube: more than any cube of today's cards has.
extern "C" {
alignas(1024) unsigned char dynamic_shared_mem[256 * 1024];
}

namespace emulated {

constexpr unsigned PLANE = 32;
constexpr size_t STACK_BYTES = 64 * 1024;

// Something that a plane does together, waited for by one of its units.
struct Operation {
    const char *name;
    void *outs[8];
    const void *ins[16];
};
enum State { READY, AT_BARRIER, IN_OPERATION, DONE };
struct Unit {
    State state;
    bool started;
    uint3 place;
    jmp_buf here;
    ucontext_t first;
    Operation operation;
};

static std::vector<Unit> units;
static std::vector<char> stacks;
static unsigned current;
static jmp_buf scheduler, host;
static ucontext_t scheduler_context;
static char message[1024];
static size_t shared_bytes;
static void (*body)();

[[noreturn]] static void fail(const char *what, const char *detail = "") {
    snprintf(message, sizeof message, "%s%s, cube (%u, %u, %u)", what, detail, blockIdx.x, blockIdx.y, blockIdx.z);
    _longjmp(host, 1);
}

static void wait_as(State state) {
    units[current].state = state;
    if (_setjmp(units[current].here) == 0) _longjmp(scheduler, 1);
}

static void begin() {
    body();
    units[current].state = DONE;
    _longjmp(scheduler, 1);
}

static void resume(unsigned unit) {
    current = unit;
    threadIdx = units[unit].place;
    if (_setjmp(scheduler) != 0) return;
    if (units[unit].started) _longjmp(units[unit].here, 1);
    units[unit].started = true;
    swapcontext(&scheduler_context, &units[unit].first);
}

static void operate(const Operation &operation) {
    units[current].operation = operation;
    wait_as(IN_OPERATION);
}

// PTX that the generated code holds as inline assembly.
template <typename... Outs, typename... Ins>
static void ptx(const char *name, std::tuple<Outs &...> outs, std::tuple<Ins &...> ins) {
    static_assert(((sizeof(Outs) == 4) && ...) && ((sizeof(Ins) == 4) && ...), "registers of 32 bits");
    static_assert(sizeof...(Outs) <= 8 && sizeof...(Ins) <= 16, "as many as an operation holds");
    // A register may be read and written by one instruction.
    uint32_t values[sizeof...(Ins) + 1];
    Operation operation = {name, {}, {}};
    unsigned i = 0;
    std::apply([&](auto &...out) { ((operation.outs[i++] = (void *)&out), ...); }, outs);
    i = 0;
    std::apply([&](auto &...in) { ((memcpy(&values[i], &in, 4), operation.ins[i] = &values[i], i++), ...); }, ins);
    operate(operation);
}

static float half_at(const void *registers, unsigned element, bool is_bfloat) {
    uint16_t bits;
    memcpy(&bits, (const char *)registers + 2 * element, 2);
    if (is_bfloat) {
        __nv_bfloat16 number;
        number.bits = bits;
        return number;
    }
    __half number;
    memcpy(&number, &bits, 2);
    return number;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": of unit `lane`, `g = lane / 4` and `t = lane % 4`, register
// `r` of A holds row `g + 8 (r % 2)` and columns `2t + 8 (r / 2)` and the next; register `r` of B rows `2t + 8r` and the next of
// column `g`; element `e` of C and D row `g + 8 (e / 2)`, column `2t + e % 2`. What the hardware rounds inside of a sum is not modelled.
static void mma(Unit *plane, bool is_bfloat) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < PLANE; lane++) {
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned r = 0; r < 4; r++)
            for (unsigned e = 0; e < 2; e++)
                a[g + 8 * (r % 2)][2 * t + 8 * (r / 2) + e] = half_at(plane[lane].operation.ins[r], e, is_bfloat);
        for (unsigned r = 0; r < 2; r++)
            for (unsigned e = 0; e < 2; e++)
                b[2 * t + 8 * r + e][g] = half_at(plane[lane].operation.ins[4 + r], e, is_bfloat);
    }
    for (unsigned lane = 0; lane < PLANE; lane++) {
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned e = 0; e < 4; e++) {
            unsigned row = g + 8 * (e / 2), column = 2 * t + e % 2;
            float c;
            memcpy(&c, plane[lane].operation.ins[6 + e], 4);
            double sum = c;
            for (unsigned k = 0; k < 16; k++) sum += double(a[row][k]) * double(b[k][column]);
            float d = float(sum);
            memcpy(plane[lane].operation.outs[e], &d, 4);
        }
    }
}

// PTX ISA, "ldmatrix": units `8i` to `8i + 7` give the addresses of the rows of matrix `i`; unit `lane` gets elements `2 (lane % 4)` and
// the next of row `lane / 4`, transposed: of column `lane / 4`.
static void ldmatrix(Unit *plane, unsigned count, bool transposed) {
    for (unsigned lane = 0; lane < 8 * count; lane++) {
        uint32_t at;
        memcpy(&at, plane[lane].operation.ins[0], 4);
        if (at % 16 != 0) fail("ldmatrix: address not a multiple of 16");
        if (at + 16 > shared_bytes) fail("ldmatrix: address beyond shared memory");
    }
    for (unsigned matrix = 0; matrix < count; matrix++) {
        uint16_t rows[8][8];
        for (unsigned row = 0; row < 8; row++) {
            uint32_t at;
            memcpy(&at, plane[8 * matrix + row].operation.ins[0], 4);
            memcpy(rows[row], &dynamic_shared_mem[at], 16);
        }
        for (unsigned lane = 0; lane < PLANE; lane++) {
            unsigned g = lane / 4, t = lane % 4;
            uint16_t pair[2];
            for (unsigned e = 0; e < 2; e++) pair[e] = transposed ? rows[2 * t + e][g] : rows[g][2 * t + e];
            memcpy(plane[lane].operation.outs[matrix], pair, 4);
        }
    }
}

static void shuffle_xor(Unit *plane) {
    uint32_t values[PLANE];
    for (unsigned lane = 0; lane < PLANE; lane++) memcpy(&values[lane], plane[lane].operation.ins[0], 4);
    for (unsigned lane = 0; lane < PLANE; lane++) {
        int mask;
        memcpy(&mask, plane[lane].operation.ins[1], 4);
        memcpy(plane[lane].operation.outs[0], &values[(lane ^ unsigned(mask)) % PLANE], 4);
    }
}

static void perform(Unit *plane) {
    const char *name = plane[0].operation.name;
    auto is = [&](const char *other) { return strcmp(name, other) == 0; };
    if (is("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")) mma(plane, true);
    else if (is("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")) mma(plane, false);
    else if (is("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16")) ldmatrix(plane, 4, false);
    else if (is("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16")) ldmatrix(plane, 4, true);
    else if (is("shfl.xor")) shuffle_xor(plane);
    else fail("not emulated: ", name);
}

// Whether the plane did something together.
static bool plane_operates(Unit *plane, unsigned size) {
    unsigned waiting = 0;
    for (unsigned lane = 0; lane < size; lane++) waiting += plane[lane].state == IN_OPERATION;
    if (waiting == 0) return false;
    if (waiting != PLANE) fail("not all units of a plane reach ", plane[0].operation.name ? plane[0].operation.name : "an operation");
    for (unsigned lane = 0; lane < PLANE; lane++)
        if (strcmp(plane[lane].operation.name, plane[0].operation.name) != 0) fail("units of a plane differ at ", plane[0].operation.name);
    perform(plane);
    for (unsigned lane = 0; lane < PLANE; lane++) plane[lane].state = READY;
    return true;
}

static void run_cube(bool reverse) {
    unsigned count = units.size(), planes = (count + PLANE - 1) / PLANE;
    memset(dynamic_shared_mem, 0xff, shared_bytes);
    for (unsigned i = 0; i < count; i++) {
        Unit &unit = units[i];
        unit.state = READY;
        unit.started = false;
        unit.operation.name = nullptr;
        unit.place = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        getcontext(&unit.first);
        unit.first.uc_stack = {&stacks[i * STACK_BYTES], 0, STACK_BYTES};
        makecontext(&unit.first, begin, 0);
    }
    for (;;) {
        for (unsigned p = 0; p < planes; p++) {
            unsigned first = PLANE * (reverse ? planes - 1 - p : p), size = min(PLANE, count - first);
            do
                for (unsigned lane = 0; lane < size; lane++) {
                    unsigned unit = first + (reverse ? size - 1 - lane : lane);
                    if (units[unit].state == READY) resume(unit);
                }
            while (plane_operates(&units[first], size));
        }
        unsigned at_barrier = 0;
        for (Unit &unit : units)
            if (unit.state == AT_BARRIER) at_barrier++, unit.state = READY;
        if (at_barrier == 0) return;
    }
}

// What went wrong, or null.
static const char *launch(const unsigned *grid, const unsigned *block, size_t bytes) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    if (bytes > sizeof dynamic_shared_mem) return "more shared memory than is emulated";
    shared_bytes = bytes;
    units.resize(block[0] * block[1] * block[2]);
    stacks.resize(units.size() * STACK_BYTES);
    if (_setjmp(host) != 0) return message;
    bool reverse = false;
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++, reverse = !reverse) run_cube(reverse);
    return nullptr;
}

static void **arguments;
template <typename... A, size_t... I> static void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(*(std::remove_cv_t<A> *)arguments[I]...);
}
template <typename... A> static void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }

} // namespace emulated

static void __syncthreads() { emulated::wait_as(emulated::AT_BARRIER); }

template <typename T> static T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4, "registers of 32 bits");
    T result;
    emulated::operate({"shfl.xor", {&result}, {&value, &mask}});
    return result;
}

static size_t __cvta_generic_to_shared(const void *pointer) { return (const unsigned char *)pointer - dynamic_shared_mem; }
