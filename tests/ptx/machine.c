/* Runs the instructions of one PTX kernel, as program.py decodes them.

   A block's threads run in lockstep: of the waiting threads, those at the lowest instruction run until one branches. So
   they meet again where branches join. Blocks take turns at atomics, in a random order. Checked on the way:
   - every address lies in an argument's storage, or in the block's shared memory, and is aligned to what is accessed
   - every barrier is reached by all threads that have not returned, every shuffle by all 32 of a warp
   - no warp reads or overwrites what another wrote, nor overwrites what another read, without a barrier between them or,
     in another block, a release and an acquire. Writing the same value is fine.
   A register holds 64 bits, whatever its type; those of one name lie together, one per thread. */

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WARP = 32, RETURNED = INT_MAX };
enum Outcome { FINISHED, PAUSED, FAILED };

/* Who touched a byte: a block (from 1; 0 is nobody), between which of its barriers, which warp, after how many releases
   of the block. */
typedef struct {
    uint32_t block, num_releases;
    uint16_t epoch;
    uint8_t warp, by_atomic;
} Touch;

/* The last who read four bytes: of a block, between two of its barriers, the warps (a bit each). */
typedef struct {
    uint32_t block, epoch, warps;
} Readers;

typedef struct {
    uint64_t start, size;
    Touch *writes;    /* of each byte, in this launch */
    Readers *readers; /* of each four */
    int32_t is_written;
} Region;

/* Of a block's writes, others see those before `epoch`, and in it those of `warp` before its release: all of them after
   epoch `since` of their own block, and in it only the warp `by`, which acquired that. */
typedef struct {
    int32_t block, epoch, warp, since, by;
    uint32_t num_releases;
} Seen;

/* What an atomic at this address has released. */
typedef struct {
    uint64_t address;
    Seen *seen;
    int32_t num_seen;
} Released;

struct Block;
typedef struct Instruction {
    void (*run)(struct Block *, const struct Instruction *);
    int64_t offset;
    int32_t guard, guard_is_negated; /* register of the predicate, or -1 */
    int32_t out[8], in[8];
    int32_t width, size; /* elements of a vector, bytes of an element */
    int32_t target;      /* of a branch */
    int32_t is_branch, pauses, acquires, releases;
} Instruction;

typedef struct {
    const Instruction *code;
    int32_t num_registers, num_threads, shared_size, num_blocks;
    Region *regions;
    int32_t num_regions;
    Released *released;
    int32_t num_released;
    int32_t *places;    /* [num_blocks], -1: scratch of synchronize */
    int32_t is_trusted; /* with global memory: nothing is checked there */
    uint64_t random;
    char error[256];
} Launch;

typedef struct Block {
    Launch *launch;
    int32_t number, n, epoch, all_run;
    uint64_t *registers; /* [num_registers, n] */
    int32_t *pc;         /* [n] */
    uint8_t *active, *runs;
    uint8_t *shared;
    Touch *shared_writes, *shared_reads;
    Seen *seen; /* of other blocks */
    int32_t num_seen;
    uint32_t num_releases;
    int32_t has_resumed;
    uint64_t num_steps;
} Block;

static void fail(Block *b, const char *format, ...) {
    if (b->launch->error[0]) return;
    va_list arguments;
    va_start(arguments, format);
    int used = snprintf(b->launch->error, sizeof b->launch->error, "block %d: ", b->number);
    vsnprintf(b->launch->error + used, sizeof b->launch->error - used, format, arguments);
    va_end(arguments);
}

/* ---- Registers and number formats ---- */

#define REGISTER(index) (b->registers + (int64_t)(index) * b->n)
#define EACH(...)                                                                                                      \
    if (b->all_run)                                                                                                    \
        for (int t = 0; t < n; t++) { __VA_ARGS__; }                                                                   \
    else                                                                                                               \
        for (int t = 0; t < n; t++)                                                                                    \
            if (b->runs[t]) { __VA_ARGS__; }
/* d = f(x, y, z), thread by thread. */
#define OP(name, ...)                                                                                                  \
    void op_##name(Block *b, const Instruction *i) {                                                                   \
        const int n = b->n;                                                                                            \
        uint64_t *d = REGISTER(i->out[0]);                                                                             \
        const uint64_t *x = REGISTER(i->in[0]), *y = REGISTER(i->in[1]), *z = REGISTER(i->in[2]);                      \
        (void)d, (void)x, (void)y, (void)z;                                                                            \
        EACH(__VA_ARGS__)                                                                                              \
    }

static inline float f32(uint64_t bits) {
    uint32_t low = (uint32_t)bits;
    float value;
    memcpy(&value, &low, 4);
    return value;
}
static inline uint64_t of_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline double f64(uint64_t bits) {
    double value;
    memcpy(&value, &bits, 8);
    return value;
}
static inline uint64_t of_f64(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return bits;
}
static inline float bf16(uint64_t bits) { return f32((bits & 0xffff) << 16); }
static inline uint64_t of_bf16(float value) {
    uint32_t bits = (uint32_t)of_f32(value);
    if (value != value) return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline float f16(uint64_t bits) {
    uint16_t low = (uint16_t)bits;
    _Float16 value;
    memcpy(&value, &low, 2);
    return value;
}
static inline uint64_t of_f16(float value) {
    _Float16 half = (_Float16)value;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline float flushed(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value; }
/* An approximate result: up to two units in the last place off, always alike for the same bits; powers of two exact. */
static inline float approximate(double exact) {
    if ((of_f64(exact) & 0xfffffffffffff) == 0) return (float)exact;
    uint64_t bits = of_f64(exact) * 0x9e3779b97f4a7c15u;
    return (float)(exact * (1.0 + ((int32_t)(bits >> 32)) * 0x1p-54));
}

/* ---- Arithmetic ---- */

#define INTEGERS(bits)                                                                                                 \
    OP(add_s##bits, d[t] = (uint##bits##_t)(x[t] + y[t]))                                                              \
    OP(sub_s##bits, d[t] = (uint##bits##_t)(x[t] - y[t]))                                                              \
    OP(mul_lo_s##bits, d[t] = (uint##bits##_t)(x[t] * y[t]))                                                           \
    OP(mad_lo_s##bits, d[t] = (uint##bits##_t)(x[t] * y[t] + z[t]))                                                    \
    OP(neg_s##bits, d[t] = (uint##bits##_t)(-x[t]))                                                                    \
    OP(abs_s##bits, d[t] = (uint##bits##_t)((int##bits##_t)x[t] < 0 ? -x[t] : x[t]))                                   \
    OP(min_s##bits, d[t] = (uint##bits##_t)((int##bits##_t)x[t] < (int##bits##_t)y[t] ? x[t] : y[t]))                  \
    OP(max_s##bits, d[t] = (uint##bits##_t)((int##bits##_t)x[t] > (int##bits##_t)y[t] ? x[t] : y[t]))                  \
    OP(min_u##bits, d[t] = (uint##bits##_t)((uint##bits##_t)x[t] < (uint##bits##_t)y[t] ? x[t] : y[t]))                \
    OP(max_u##bits, d[t] = (uint##bits##_t)((uint##bits##_t)x[t] > (uint##bits##_t)y[t] ? x[t] : y[t]))                \
    OP(and_b##bits, d[t] = (uint##bits##_t)(x[t] & y[t]))                                                              \
    OP(or_b##bits, d[t] = (uint##bits##_t)(x[t] | y[t]))                                                               \
    OP(xor_b##bits, d[t] = (uint##bits##_t)(x[t] ^ y[t]))                                                              \
    OP(not_b##bits, d[t] = (uint##bits##_t)(~x[t]))                                                                    \
    OP(shl_b##bits, d[t] = (uint32_t)y[t] >= bits ? 0 : (uint##bits##_t)(x[t] << (uint32_t)y[t]))                      \
    OP(shr_u##bits, d[t] = (uint32_t)y[t] >= bits ? 0 : (uint##bits##_t)x[t] >> (uint32_t)y[t])                        \
    OP(shr_s##bits, d[t] = (uint##bits##_t)((int##bits##_t)x[t] >> ((uint32_t)y[t] >= bits ? bits - 1 : (uint32_t)y[t])))
INTEGERS(16)
INTEGERS(32)
INTEGERS(64)

OP(and_pred, d[t] = x[t] & y[t])
OP(or_pred, d[t] = x[t] | y[t])
OP(xor_pred, d[t] = x[t] ^ y[t])
OP(not_pred, d[t] = !x[t])
OP(mov, d[t] = x[t])
OP(mov_pred, d[t] = x[t] & 1)
OP(selp, d[t] = z[t] ? x[t] : y[t])
OP(mul_hi_u32, d[t] = ((uint64_t)(uint32_t)x[t] * (uint32_t)y[t]) >> 32)
OP(mul_hi_s32, d[t] = (uint32_t)(((int64_t)(int32_t)x[t] * (int32_t)y[t]) >> 32))
OP(mul_hi_s64, d[t] = (uint64_t)(((__int128)(int64_t)x[t] * (int64_t)y[t]) >> 64))
OP(mul_wide_s32, d[t] = (int64_t)(int32_t)x[t] * (int32_t)y[t])
OP(mul_wide_u32, d[t] = (uint64_t)(uint32_t)x[t] * (uint32_t)y[t])
OP(mul_wide_u16, d[t] = (uint32_t)(uint16_t)x[t] * (uint16_t)y[t])
OP(mul_wide_s16, d[t] = (uint32_t)((int16_t)x[t] * (int16_t)y[t]))
OP(mad_wide_s32, d[t] = (int64_t)(int32_t)x[t] * (int32_t)y[t] + z[t])
OP(mad_wide_u32, d[t] = (uint64_t)(uint32_t)x[t] * (uint32_t)y[t] + z[t])
OP(mad_wide_u16, d[t] = (uint32_t)((uint32_t)(uint16_t)x[t] * (uint16_t)y[t] + (uint32_t)z[t]))
OP(mad_wide_s16, d[t] = (uint32_t)((int16_t)x[t] * (int16_t)y[t] + (uint32_t)z[t]))
OP(div_u32, d[t] = (uint32_t)y[t] ? (uint32_t)x[t] / (uint32_t)y[t] : 0xffffffff)
OP(rem_u32, d[t] = (uint32_t)y[t] ? (uint32_t)x[t] % (uint32_t)y[t] : x[t])
OP(div_s32, d[t] = (uint32_t)((int32_t)y[t] ? (int64_t)(int32_t)x[t] / (int32_t)y[t] : -1))
OP(rem_s32, d[t] = (uint32_t)((int32_t)y[t] ? (int64_t)(int32_t)x[t] % (int32_t)y[t] : (int32_t)x[t]))
OP(div_s64, d[t] = y[t] && y[t] != -1ull ? (uint64_t)((int64_t)x[t] / (int64_t)y[t]) : -x[t])
OP(rem_s64, d[t] = y[t] && y[t] != -1ull ? (uint64_t)((int64_t)x[t] % (int64_t)y[t]) : 0)
OP(div_u64, d[t] = y[t] ? x[t] / y[t] : -1ull)
OP(rem_u64, d[t] = y[t] ? x[t] % y[t] : x[t])
OP(popc_b32, d[t] = __builtin_popcount((uint32_t)x[t]))
OP(popc_b64, d[t] = __builtin_popcountll(x[t]))

static inline uint64_t field(uint64_t bits, uint32_t start, uint32_t length) {
    if (start > 31 || !length) return 0;
    return ((uint32_t)bits >> start) & (length > 31 ? 0xffffffff : (1u << length) - 1);
}
static inline uint64_t signed_field(uint64_t bits, uint32_t start, uint32_t length) {
    if (!length) return 0;
    uint32_t last = start + length - 1 > 31 ? 31 : start + length - 1;
    uint64_t sign = ((uint32_t)bits >> last) & 1, value = field(bits, start, length);
    return sign && length < 32 ? (uint32_t)(value | (0xffffffffu << (last - start))) : value;
}
OP(bfe_u32, d[t] = field(x[t], y[t] & 0xff, z[t] & 0xff))
OP(bfe_s32, d[t] = signed_field(x[t], y[t] & 0xff, z[t] & 0xff))

static inline uint64_t permuted(uint64_t low, uint64_t high, uint32_t selector) {
    uint64_t bytes = (high << 32) | (uint32_t)low, result = 0;
    for (int k = 0; k < 4; k++) {
        uint32_t pick = selector >> (4 * k);
        uint64_t byte = (bytes >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * k);
    }
    return result;
}
OP(prmt_b32, d[t] = permuted(x[t], y[t], (uint32_t)z[t]))

#define FLOATS(type)                                                                                                   \
    OP(add_##type, d[t] = of_##type(type(x[t]) + type(y[t])))                                                          \
    OP(sub_##type, d[t] = of_##type(type(x[t]) - type(y[t])))                                                          \
    OP(mul_##type, d[t] = of_##type(type(x[t]) * type(y[t])))                                                          \
    OP(neg_##type, d[t] = of_##type(-type(x[t])))                                                                      \
    OP(abs_##type, d[t] = of_##type(fabs(type(x[t]))))                                                                 \
    OP(div_rn_##type, d[t] = of_##type(type(x[t]) / type(y[t])))
FLOATS(f32)
FLOATS(f64)
OP(fma_rn_f32, d[t] = of_f32(fmaf(f32(x[t]), f32(y[t]), f32(z[t]))))
OP(fma_rn_f64, d[t] = of_f64(fma(f64(x[t]), f64(y[t]), f64(z[t]))))
OP(fma_rn_ftz_f32, d[t] = of_f32(flushed(fmaf(flushed(f32(x[t])), flushed(f32(y[t])), flushed(f32(z[t]))))))
/* NaN gives way to a number, and -0 is below 0. */
static inline uint64_t lesser(uint64_t x, uint64_t y) {
    return f32(x) == f32(y) ? (uint32_t)(x | y) : of_f32(fminf(f32(x), f32(y)));
}
static inline uint64_t greater(uint64_t x, uint64_t y) {
    return f32(x) == f32(y) ? (uint32_t)(x & y) : of_f32(fmaxf(f32(x), f32(y)));
}
static inline uint64_t greater_or_nan(uint64_t x, uint64_t y) {
    return isnan(f32(x)) || isnan(f32(y)) ? 0x7fffffff : greater(x, y);
}
OP(min_f32, d[t] = lesser(x[t], y[t]))
OP(max_f32, d[t] = greater(x[t], y[t]))
OP(min3_f32, d[t] = lesser(lesser(x[t], y[t]), z[t]))
OP(max3_f32, d[t] = greater(greater(x[t], y[t]), z[t]))
OP(max_NaN_f32, d[t] = greater_or_nan(x[t], y[t]))
OP(max3_NaN_f32, d[t] = greater_or_nan(greater_or_nan(x[t], y[t]), z[t]))
OP(ex2_approx_f32, d[t] = of_f32(approximate(exp2(f32(x[t])))))
OP(ex2_approx_ftz_f32, d[t] = of_f32(flushed(approximate(exp2(flushed(f32(x[t])))))))
OP(lg2_approx_ftz_f32, d[t] = of_f32(approximate(log2(flushed(f32(x[t]))))))
OP(sqrt_approx_ftz_f32, d[t] = of_f32(approximate(sqrt(flushed(f32(x[t]))))))
OP(rcp_approx_ftz_f32, d[t] = of_f32(flushed(approximate(1.0 / flushed(f32(x[t]))))))
OP(div_full_f32, d[t] = of_f32(approximate((double)f32(x[t]) / f32(y[t]))))

OP(cvt_f32_bf16, d[t] = of_f32(bf16(x[t])))
OP(cvt_f32_f16, d[t] = of_f32(f16(x[t])))
OP(cvt_f64_f32, d[t] = of_f64(f32(x[t])))
OP(cvt_rn_f32_f64, d[t] = of_f32((float)f64(x[t])))
OP(cvt_rn_f32_s32, d[t] = of_f32((float)(int32_t)x[t]))
OP(cvt_rn_f32_u32, d[t] = of_f32((float)(uint32_t)x[t]))
OP(cvt_rn_f32_s64, d[t] = of_f32((float)(int64_t)x[t]))
OP(cvt_rn_f64_s32, d[t] = of_f64((double)(int32_t)x[t]))
OP(cvt_rn_f64_s64, d[t] = of_f64((double)(int64_t)x[t]))
OP(cvt_rn_bf16_f32, d[t] = of_bf16(f32(x[t])))
OP(cvt_rn_f16_f32, d[t] = of_f16(f32(x[t])))
OP(cvt_rn_bf16x2_f32, d[t] = of_bf16(f32(x[t])) << 16 | of_bf16(f32(y[t])))
OP(cvt_rn_f16x2_f32, d[t] = of_f16(f32(x[t])) << 16 | of_f16(f32(y[t])))
OP(cvt_rzi_s32_f32, float v = f32(x[t]);
   d[t] = v != v ? 0 : (uint32_t)(v >= 0x1p31f ? INT32_MAX : v < -0x1p31f ? INT32_MIN : (int32_t)v))
OP(cvt_rzi_u32_f32, float v = f32(x[t]); d[t] = v >= 0x1p32f ? UINT32_MAX : v > 0 ? (uint32_t)v : 0)
OP(cvt_rzi_s64_f32, float v = f32(x[t]);
   d[t] = v != v ? 0x8000000000000000u : v >= 0x1p63f ? INT64_MAX : (uint64_t)(v < -0x1p63f ? INT64_MIN : (int64_t)v))
OP(cvt_s64_s32, d[t] = (int64_t)(int32_t)x[t])
OP(cvt_s64_s16, d[t] = (int64_t)(int16_t)x[t])
OP(cvt_s32_s16, d[t] = (uint32_t)(int16_t)x[t])
OP(cvt_s32_s8, d[t] = (uint32_t)(int8_t)x[t])
OP(cvt_s16_s8, d[t] = (uint16_t)(int8_t)x[t])
OP(cvt_u64_u32, d[t] = (uint32_t)x[t])
OP(cvt_u32_u64, d[t] = (uint32_t)x[t])
OP(cvt_u32_u16, d[t] = (uint16_t)x[t])
OP(cvt_u64_u16, d[t] = (uint16_t)x[t])
OP(cvt_u16_u32, d[t] = (uint16_t)x[t])
OP(cvt_u16_u64, d[t] = (uint16_t)x[t])

/* Pairs of floats, of compute capability 10.0. */
static inline uint64_t two(float low, float high) { return of_f32(high) << 32 | of_f32(low); }
OP(add_f32x2, d[t] = two(f32(x[t]) + f32(y[t]), f32(x[t] >> 32) + f32(y[t] >> 32)))
OP(sub_f32x2, d[t] = two(f32(x[t]) - f32(y[t]), f32(x[t] >> 32) - f32(y[t] >> 32)))
OP(mul_f32x2, d[t] = two(f32(x[t]) * f32(y[t]), f32(x[t] >> 32) * f32(y[t] >> 32)))
OP(fma_rn_f32x2, d[t] = two(fmaf(f32(x[t]), f32(y[t]), f32(z[t])),
                            fmaf(f32(x[t] >> 32), f32(y[t] >> 32), f32(z[t] >> 32))))

/* Comparisons; those that end in u also hold if an operand is NaN. */
#define COMPARE(type, get)                                                                                             \
    OP(setp_eq_##type, d[t] = get(x[t]) == get(y[t]))                                                                  \
    OP(setp_ne_##type, d[t] = get(x[t]) != get(y[t]))                                                                  \
    OP(setp_lt_##type, d[t] = get(x[t]) < get(y[t]))                                                                   \
    OP(setp_le_##type, d[t] = get(x[t]) <= get(y[t]))                                                                  \
    OP(setp_gt_##type, d[t] = get(x[t]) > get(y[t]))                                                                   \
    OP(setp_ge_##type, d[t] = get(x[t]) >= get(y[t]))
#define COMPARE_FLOATS(type)                                                                                           \
    OP(setp_eq_##type, d[t] = type(x[t]) == type(y[t]))                                                                \
    OP(setp_ne_##type, d[t] = islessgreater(type(x[t]), type(y[t])))                                                   \
    OP(setp_lt_##type, d[t] = type(x[t]) < type(y[t]))                                                                 \
    OP(setp_le_##type, d[t] = type(x[t]) <= type(y[t]))                                                                \
    OP(setp_gt_##type, d[t] = type(x[t]) > type(y[t]))                                                                 \
    OP(setp_ge_##type, d[t] = type(x[t]) >= type(y[t]))                                                                \
    OP(setp_equ_##type, d[t] = !islessgreater(type(x[t]), type(y[t])))                                                 \
    OP(setp_neu_##type, d[t] = type(x[t]) != type(y[t]))                                                               \
    OP(setp_ltu_##type, d[t] = !(type(x[t]) >= type(y[t])))                                                            \
    OP(setp_leu_##type, d[t] = !(type(x[t]) > type(y[t])))                                                             \
    OP(setp_gtu_##type, d[t] = !(type(x[t]) <= type(y[t])))                                                            \
    OP(setp_geu_##type, d[t] = !(type(x[t]) < type(y[t])))                                                             \
    OP(setp_num_##type, d[t] = !isunordered(type(x[t]), type(y[t])))                                                   \
    OP(setp_nan_##type, d[t] = isunordered(type(x[t]), type(y[t])))
#define S16(v) ((int16_t)(v))
#define U16(v) ((uint16_t)(v))
#define S32(v) ((int32_t)(v))
#define U32(v) ((uint32_t)(v))
#define S64(v) ((int64_t)(v))
#define U64(v) ((uint64_t)(v))
COMPARE(s16, S16)
COMPARE(u16, U16)
COMPARE(b16, U16)
COMPARE(s32, S32)
COMPARE(u32, U32)
COMPARE(b32, U32)
COMPARE(s64, S64)
COMPARE(u64, U64)
COMPARE(b64, U64)
COMPARE_FLOATS(f32)
COMPARE_FLOATS(f64)
COMPARE_FLOATS(bf16)
COMPARE_FLOATS(f16)
#define OF_PAIRS(type)                                                                                                 \
    OP(setp_num_##type##x2, REGISTER(i->out[1])[t] = !isunordered(type(x[t] >> 16), type(y[t] >> 16));                 \
       d[t] = !isunordered(type(x[t]), type(y[t])))                                                                    \
    OP(setp_nan_##type##x2, REGISTER(i->out[1])[t] = isunordered(type(x[t] >> 16), type(y[t] >> 16));                  \
       d[t] = isunordered(type(x[t]), type(y[t])))
OF_PAIRS(bf16)
OF_PAIRS(f16)

/* Registers packed into a wider one of `width` parts of `size` bytes, and back. A register -1 is thrown away. */
void op_pack(Block *b, const Instruction *i) {
    const int n = b->n, bits = 8 * i->size;
    uint64_t *d = REGISTER(i->out[0]);
    uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
    EACH(uint64_t value = 0; for (int k = 0; k < i->width; k++) value |= (REGISTER(i->in[k])[t] & mask) << (bits * k);
         d[t] = value)
}
void op_unpack(Block *b, const Instruction *i) {
    const int n = b->n, bits = 8 * i->size;
    const uint64_t *x = REGISTER(i->in[0]);
    uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
    EACH(uint64_t value = x[t]; for (int k = 0; k < i->width; k++) if (i->out[k] >= 0)
             REGISTER(i->out[k])[t] = (value >> (bits * k)) & mask)
}

/* ---- Memory ---- */

static Region *region_of(Block *b, uint64_t address, int size) {
    static int last = 0;
    Launch *l = b->launch;
    for (int k = 0; k < l->num_regions; k++) {
        int r = (last + k) % l->num_regions;
        if (address >= l->regions[r].start && address + size <= l->regions[r].start + l->regions[r].size) {
            last = r;
            return &l->regions[r];
        }
    }
    return NULL;
}

/* Whether this block's `warp` may touch what `who` has written. */
static int is_ordered(Block *b, Touch who, int warp) {
    if (!who.block) return 1;
    if (who.block == (uint32_t)b->number + 1) return who.epoch < b->epoch || who.warp == warp;
    for (int k = 0; k < b->num_seen; k++) {
        Seen seen = b->seen[k];
        if (seen.block == (int32_t)who.block - 1)
            return (who.epoch < seen.epoch ||
                    (who.epoch == seen.epoch && who.warp == seen.warp && who.num_releases <= seen.num_releases)) &&
                   (seen.since < b->epoch || seen.by == warp);
    }
    return 0;
}

/* Whether this block's `warp` may overwrite what `readers` have read. */
static int may_overwrite(Block *b, Readers readers, int warp) {
    if (readers.block == (uint32_t)b->number + 1) return readers.epoch < b->epoch || !(readers.warps & ~(1u << warp));
    for (int reader = 0; reader < WARP; reader++) {
        Touch read = {readers.block, 0, readers.epoch, reader, 0};
        if (readers.warps >> reader & 1 && !is_ordered(b, read, warp)) return 0;
    }
    return 1;
}

/* The place of an address to read, or to write `value` to; NULL, and the launch fails, where there is none. */
static uint8_t *global_at(Block *b, uint64_t address, int size, int t, const uint64_t *value, int is_atomic) {
    int is_write = value || is_atomic;
    if (b->launch->is_trusted) return (uint8_t *)address;
    Region *region = region_of(b, address, size);
    if (!region) {
        fail(b, "thread %d %s %d bytes at %#lx, outside of every argument", t, is_write ? "writes" : "reads", size, address);
        return NULL;
    }
    Touch now = {b->number + 1, b->num_releases, b->epoch, t / WARP, is_atomic};
    Touch *writes = region->writes + (address - region->start);
    Readers *readers = region->readers + (address - region->start) / 4;
    region->is_written |= is_write;
    if (is_write && !(value && !memcmp((void *)address, value, size)) && !may_overwrite(b, *readers, t / WARP))
        fail(b, "race: thread %d overwrites at %#lx what block %d reads", t, address, readers->block - 1);
    if (!is_write) {
        if (readers->block != now.block || readers->epoch != now.epoch) *readers = (Readers){now.block, now.epoch, 0};
        readers->warps |= 1u << now.warp;
    }
    for (int k = 0; k < size && region->is_written; k++) {
        int is_same = value && ((uint8_t *)address)[k] == ((const uint8_t *)value)[k];
        if (!is_same && !(is_atomic && writes[k].by_atomic) && !is_ordered(b, writes[k], t / WARP))
            fail(b, "race: thread %d %s at %#lx what block %d wrote", t, is_write ? "writes" : "reads", address,
                 writes[k].block - 1);
        if (is_write) writes[k] = now;
    }
    return (uint8_t *)address;
}

static uint8_t *shared_at(Block *b, uint64_t address, int size, int t, const uint64_t *value) {
    int is_write = value != NULL;
    if (address + size > (uint64_t)b->launch->shared_size) {
        fail(b, "thread %d touches %d bytes of shared memory at %ld of %d", t, size, address, b->launch->shared_size);
        return NULL;
    }
    Touch now = {b->number + 1, 0, b->epoch, t / WARP, 0};
    for (int k = 0; k < size; k++) {
        Touch wrote = b->shared_writes[address + k], read = b->shared_reads[address + k];
        int is_race = wrote.block == now.block && wrote.epoch == now.epoch && wrote.warp != now.warp;
        if (is_write) is_race &= b->shared[address + k] != ((const uint8_t *)value)[k];
        if (is_write) is_race |= read.block == now.block && read.epoch == now.epoch && read.warp != now.warp;
        if (is_race) fail(b, "race: thread %d %s shared memory at %ld", t, is_write ? "writes" : "reads", address);
        *(is_write ? &b->shared_writes[address + k] : &b->shared_reads[address + k]) = now;
    }
    return b->shared + address;
}

static uint64_t aligned(Block *b, const Instruction *i, int t) {
    uint64_t address = REGISTER(i->in[0])[t] + i->offset;
    if (address % (i->width * i->size)) fail(b, "thread %d: %#lx is not aligned", t, address);
    return address;
}

#define MEMORY(space, find_to_read, find_to_write)                                                                     \
    void op_ld_##space(Block *b, const Instruction *i) {                                                               \
        const int n = b->n;                                                                                            \
        EACH(uint64_t start = aligned(b, i, t); for (int k = 0; k < i->width; k++) {                                   \
            uint64_t address = start + k * i->size, value = 0;                                                         \
            uint8_t *place = find_to_read;                                                                             \
            if (!place) return;                                                                                        \
            memcpy(&value, place, i->size);                                                                            \
            b->registers[(int64_t)i->out[k] * n + t] = value;                                                          \
        })                                                                                                             \
    }                                                                                                                  \
    void op_st_##space(Block *b, const Instruction *i) {                                                               \
        const int n = b->n;                                                                                            \
        EACH(uint64_t start = aligned(b, i, t); for (int k = 0; k < i->width; k++) {                                   \
            uint64_t address = start + k * i->size;                                                                    \
            const uint64_t *value = &REGISTER(i->in[1 + k])[t];                                                        \
            uint8_t *place = find_to_write;                                                                            \
            if (!place) return;                                                                                        \
            memcpy(place, value, i->size);                                                                             \
        })                                                                                                             \
    }
MEMORY(global, global_at(b, address, i->size, t, NULL, 0), global_at(b, address, i->size, t, value, 0))
MEMORY(shared, shared_at(b, (uint32_t)address, i->size, t, NULL), shared_at(b, (uint32_t)address, i->size, t, value))

/* Merges `from` into a list, the later of two entries for a block; `since` and `by`: who acquires that. */
static void merge(Launch *l, Seen **list, int32_t *length, const Seen *from, int num_from, int since, int by) {
    for (int k = 0; k < *length; k++) l->places[(*list)[k].block] = k;
    for (int k = 0; k < num_from; k++) {
        int32_t *place = &l->places[from[k].block];
        if (*place < 0) {
            *list = realloc(*list, (*length + 1) * sizeof(Seen));
            *place = (*length)++;
        } else {
            Seen old = (*list)[*place];
            if (old.epoch > from[k].epoch || (old.epoch == from[k].epoch && old.num_releases >= from[k].num_releases))
                continue;
        }
        (*list)[*place] = (Seen){from[k].block, from[k].epoch, from[k].warp, since, by, from[k].num_releases};
    }
    for (int k = 0; k < *length; k++) l->places[(*list)[k].block] = -1;
}

/* What this block has seen and written is released with the address; what others released there, it sees from now on. */
static void synchronize(Block *b, const Instruction *i, uint64_t address, int t) {
    Launch *l = b->launch;
    int r = 0;
    while (r < l->num_released && l->released[r].address != address) r++;
    if (r == l->num_released) {
        l->released = realloc(l->released, (l->num_released + 1) * sizeof(Released));
        l->released[l->num_released++] = (Released){.address = address};
    }
    Released *at = &l->released[r];
    Seen own = {b->number, b->epoch, t / WARP, 0, 0, b->num_releases};
    if (i->acquires) merge(l, &b->seen, &b->num_seen, at->seen, at->num_seen, b->epoch, t / WARP);
    if (!i->releases) return;
    merge(l, &at->seen, &at->num_seen, b->seen, b->num_seen, 0, 0);
    merge(l, &at->seen, &at->num_seen, &own, 1, 0, 0);
    b->num_releases++;
}

#define ATOMIC(name, bits, value)                                                                                      \
    void op_atom_##name(Block *b, const Instruction *i) {                                                              \
        const int n = b->n;                                                                                            \
        const uint64_t *x = REGISTER(i->in[1]);                                                                        \
        EACH(uint64_t address = aligned(b, i, t);                                                                      \
             uint8_t *place = global_at(b, address, bits / 8, t, NULL, 1); if (!place) return; uint##bits##_t old;        \
             memcpy(&old, place, bits / 8); uint##bits##_t new = (uint##bits##_t)(value); memcpy(place, &new, bits / 8); \
             if (i->out[0] >= 0) REGISTER(i->out[0])[t] = old; synchronize(b, i, address, t))                          \
    }
ATOMIC(add_u32, 32, old + x[t])
ATOMIC(add_s32, 32, old + x[t])
ATOMIC(add_u64, 64, old + x[t])
ATOMIC(min_s32, 32, (int32_t)old < (int32_t)x[t] ? old : x[t])
ATOMIC(max_s32, 32, (int32_t)old > (int32_t)x[t] ? old : x[t])
ATOMIC(exch_b32, 32, x[t])
ATOMIC(or_b32, 32, old | x[t])
ATOMIC(and_b32, 32, old & x[t])
ATOMIC(add_f32, 32, of_f32(f32(old) + f32(x[t])))
ATOMIC(add_f64, 64, of_f64(f64(old) + f64(x[t])))

/* ---- Threads together ---- */

static int warp_is_whole(Block *b, int first) {
    for (int lane = 0; lane < WARP; lane++)
        if (!b->runs[first + lane]) {
            if (lane) fail(b, "threads %d .. of a warp take part in an exchange, not all", first);
            return 0;
        }
    return 1;
}

#define SHUFFLE(name, source, is_valid)                                                                                \
    void op_shfl_##name(Block *b, const Instruction *i) {                                                              \
        uint64_t *d = REGISTER(i->out[0]), before[WARP];                                                               \
        const uint64_t *x = REGISTER(i->in[0]), *y = REGISTER(i->in[1]), *z = REGISTER(i->in[2]);                      \
        for (int first = 0; first < b->n; first += WARP) {                                                             \
            if (!warp_is_whole(b, first)) continue;                                                                    \
            for (int lane = 0; lane < WARP; lane++) before[lane] = x[first + lane];                                    \
            for (int lane = 0; lane < WARP; lane++) {                                                                  \
                int by = y[first + lane] & 31, segment = (z[first + lane] >> 8) & 31;                                  \
                int lowest = lane & segment, limit = lowest | (z[first + lane] & 31 & ~segment);                       \
                (void)lowest;                                                                                          \
                int from = source;                                                                                     \
                d[first + lane] = (uint32_t)before[(is_valid) ? from : lane];                                          \
            }                                                                                                          \
        }                                                                                                              \
    }
SHUFFLE(up, lane - by, from >= limit)
SHUFFLE(down, lane + by, from <= limit)
SHUFFLE(bfly, lane ^ by, from <= limit)
SHUFFLE(idx, lowest | (by & ~segment), from <= limit)

#define REDUCE(name, combined)                                                                                         \
    void op_redux_##name(Block *b, const Instruction *i) {                                                             \
        uint64_t *d = REGISTER(i->out[0]);                                                                             \
        const uint64_t *x = REGISTER(i->in[0]);                                                                        \
        for (int first = 0; first < b->n; first += WARP) {                                                             \
            if (!warp_is_whole(b, first)) continue;                                                                    \
            uint64_t result = x[first];                                                                                \
            for (int lane = 1; lane < WARP; lane++) {                                                                  \
                uint64_t next = x[first + lane];                                                                       \
                result = (uint32_t)(combined);                                                                         \
            }                                                                                                          \
            for (int lane = 0; lane < WARP; lane++) d[first + lane] = result;                                          \
        }                                                                                                              \
    }
REDUCE(max_f32, greater(result, next))
REDUCE(max_NaN_f32, greater_or_nan(result, next))
REDUCE(min_f32, lesser(result, next))
REDUCE(add_s32, result + next)
REDUCE(max_s32, (int32_t)result > (int32_t)next ? result : next)
REDUCE(min_s32, (int32_t)result < (int32_t)next ? result : next)

/* Eight rows of eight b16 a matrix; thread 8 m + r gives the address of matrix m's row r and thread 4 r + c holds its
   elements 2 c and 2 c + 1; transposed, elements r of rows 2 c and 2 c + 1. */
static void matrices(Block *b, const Instruction *i, int is_write, int is_transposed) {
    for (int first = 0; first < b->n; first += WARP) {
        if (!warp_is_whole(b, first)) continue;
        for (int m = 0; m < i->width; m++)
            for (int lane = 0; lane < WARP; lane++) {
                uint64_t *pair = &REGISTER(is_write ? i->in[1 + m] : i->out[m])[first + lane], read = 0;
                for (int half = 0; half < 2; half++) {
                    int row = lane / 4, column = 2 * (lane % 4) + half;
                    if (is_transposed) row = 2 * (lane % 4) + half, column = lane / 4;
                    int thread = first + 8 * m + row;
                    uint32_t address = (uint32_t)(REGISTER(i->in[0])[thread] + i->offset);
                    if (address % 16) return fail(b, "thread %d: %#x is not aligned", thread, address);
                    uint64_t element = *pair >> (16 * half) & 0xffff;
                    uint8_t *place = shared_at(b, address + 2 * column, 2, first + lane, is_write ? &element : NULL);
                    if (!place) return;
                    memcpy(is_write ? (void *)place : &element, is_write ? (void *)&element : place, 2);
                    read |= (element & 0xffff) << (16 * half);
                }
                if (!is_write) *pair = read;
            }
    }
}
void op_ldmatrix(Block *b, const Instruction *i) { matrices(b, i, 0, 0); }
void op_stmatrix(Block *b, const Instruction *i) { matrices(b, i, 1, 0); }
void op_ldmatrix_trans(Block *b, const Instruction *i) { matrices(b, i, 0, 1); }
void op_stmatrix_trans(Block *b, const Instruction *i) { matrices(b, i, 1, 1); }

void op_bar_sync(Block *b, const Instruction *i) {
    (void)i;
    for (int t = 0; t < b->n; t++)
        if (b->pc[t] != RETURNED && !b->runs[t]) return fail(b, "thread %d is not at the barrier where others are", t);
    b->epoch++;
}

/* ---- Running ---- */

static Block *new_block(Launch *launch) {
    Block *b = malloc(sizeof(Block));
    int n = launch->num_threads;
    *b = (Block){.launch = launch, .n = n};
    b->registers = malloc((size_t)launch->num_registers * n * 8);
    memset(b->registers, 0xff, (size_t)launch->num_registers * n * 8); /* NaN, where nothing has been written */
    b->pc = malloc(n * sizeof(int32_t));
    b->active = malloc(n);
    b->runs = malloc(n);
    b->shared = malloc(launch->shared_size + 1);
    b->shared_writes = calloc(launch->shared_size + 1, sizeof(Touch));
    b->shared_reads = calloc(launch->shared_size + 1, sizeof(Touch));
    return b;
}
static void free_block(Block *b) {
    free(b->registers), free(b->pc), free(b->active), free(b->runs), free(b->shared);
    free(b->shared_writes), free(b->shared_reads), free(b->seen), free(b);
}
static void set_register(Block *b, int index, uint64_t value) {
    uint64_t *d = REGISTER(index);
    for (int t = 0; t < b->n; t++) d[t] = value;
}
static uint64_t next_random(Launch *l) {
    l->random = l->random * 6364136223846793005u + 1442695040888963407u;
    return l->random >> 33;
}

/* Until all threads have returned, or an atomic lets others go first. The index of a failed instruction in *at. */
static enum Outcome run_block(Block *b, int *at) {
    const Instruction *code = b->launch->code;
    int n = b->n;
    for (;;) {
        int pc = RETURNED, next = RETURNED;
        for (int t = 0; t < n; t++)
            if (b->pc[t] < pc) pc = b->pc[t];
        if (pc == RETURNED) return FINISHED;
        int all_active = 1;
        for (int t = 0; t < n; t++) {
            b->active[t] = b->pc[t] == pc;
            all_active &= b->active[t];
            if (!b->active[t] && b->pc[t] < next) next = b->pc[t];
        }
        for (;; pc++) {
            const Instruction *i = &code[pc];
            *at = pc;
            if (pc == next || (i->pauses && !b->has_resumed && next_random(b->launch) % 2)) {
                for (int t = 0; t < n; t++)
                    if (b->active[t]) b->pc[t] = pc;
                if (pc == next) break;
                b->has_resumed = 1;
                return PAUSED;
            }
            b->has_resumed = 0;
            if (++b->num_steps > 50000000) fail(b, "does not end");
            b->all_run = all_active;
            memcpy(b->runs, b->active, n);
            if (i->guard >= 0) {
                const uint64_t *guard = REGISTER(i->guard);
                b->all_run = 1;
                for (int t = 0; t < n; t++) {
                    b->runs[t] &= guard[t] != (uint64_t)i->guard_is_negated;
                    b->all_run &= b->runs[t];
                }
            }
            if (!i->is_branch) i->run(b, i);
            if (b->launch->error[0]) return FAILED;
            if (i->is_branch) {
                for (int t = 0; t < n; t++)
                    if (b->active[t]) b->pc[t] = b->runs[t] ? i->target : pc + 1;
                break;
            }
        }
    }
}

/* Runs all blocks, `resident` at a time. constants: pairs of a register and its value. Returns -1, or the instruction
   that failed; launch->error says why. ids: registers of %tid.x, %ctaid.x, .y, .z. */
int run_launch(Launch *l, const int *grid, int resident, int num_constants, const int *registers,
               const uint64_t *values, const int *ids) {
    int num_blocks = l->num_blocks, started = 0, num_running = 0, at = -1;
    if (resident > num_blocks) resident = num_blocks;
    Block **blocks = malloc(resident * sizeof(Block *)); /* those that run, then those that are free */
    for (int k = 0; k < resident; k++) {
        blocks[k] = new_block(l);
        for (int c = 0; c < num_constants; c++) set_register(blocks[k], registers[c], values[c]);
        for (int t = 0; t < l->num_threads; t++) blocks[k]->registers[(int64_t)ids[0] * l->num_threads + t] = t;
    }
    int *order = malloc(num_blocks * sizeof(int));
    l->places = malloc(num_blocks * sizeof(int32_t));
    for (int k = 0; k < num_blocks; k++) order[k] = k, l->places[k] = -1;
    for (int k = num_blocks - 1; k > 0; k--) {
        int other = next_random(l) % (k + 1), kept = order[k];
        order[k] = order[other], order[other] = kept;
    }
    for (int r = 0; r < l->num_regions; r++) {
        l->regions[r].writes = calloc(l->regions[r].size, sizeof(Touch));
        l->regions[r].readers = calloc(l->regions[r].size / 4 + 1, sizeof(Readers));
    }
    while ((num_running || started < num_blocks) && !l->error[0]) {
        while (num_running < resident && started < num_blocks) {
            Block *b = blocks[num_running++];
            b->number = order[started++];
            b->epoch = b->num_seen = b->num_releases = b->has_resumed = b->num_steps = 0;
            memset(b->pc, 0, b->n * sizeof(int32_t));
            memset(b->shared, 0xa5, l->shared_size);
            set_register(b, ids[1], b->number % grid[0]);
            set_register(b, ids[2], b->number / grid[0] % grid[1]);
            set_register(b, ids[3], b->number / grid[0] / grid[1]);
        }
        int chosen = next_random(l) % num_running;
        Block *b = blocks[chosen];
        if (run_block(b, &at) == FINISHED) blocks[chosen] = blocks[--num_running], blocks[num_running] = b;
    }
    for (int k = 0; k < resident; k++) free_block(blocks[k]);
    for (int r = 0; r < l->num_regions; r++) free(l->regions[r].writes), free(l->regions[r].readers);
    for (int r = 0; r < l->num_released; r++) free(l->released[r].seen);
    free(l->released), free(l->places), free(blocks), free(order);
    return l->error[0] ? at : -1;
}
