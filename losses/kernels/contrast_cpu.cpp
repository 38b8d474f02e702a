// L1 distances between vectors, and their gradient, on the CPU. Results do not depend on the number of threads.
//
// Lanes of a SIMD vector run along the columns of the result, and every sum runs over its terms in their order: no sum
// across lanes, equal distances come out equal, and no [rows, rows, depth] is ever in memory.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 64;  // bytes of a SIMD vector
#else
constexpr int WIDTH = 32;
#endif
constexpr int ROWS = 4, VECTORS = 2;  // a tile that the registers hold
constexpr int64_t STRIP = 32;         // rows that a thread takes at a time; a multiple of ROWS

template <typename T> struct Simd;
template <> struct Simd<float> {
    typedef float Vector __attribute__((vector_size(WIDTH)));
    typedef int32_t Bits __attribute__((vector_size(WIDTH)));
    static constexpr int32_t SIGN = INT32_MIN;
};
template <> struct Simd<double> {
    typedef double Vector __attribute__((vector_size(WIDTH)));
    typedef int64_t Bits __attribute__((vector_size(WIDTH)));
    static constexpr int64_t SIGN = INT64_MIN;
};
template <typename T> using Vector = typename Simd<T>::Vector;
template <typename T> using Bits = typename Simd<T>::Bits;
template <typename T> constexpr int LANES = WIDTH / sizeof(T);
template <typename T> constexpr int COLUMNS = VECTORS * LANES<T>;  // of a tile

template <typename T> Vector<T> load(const T* from) {
    Vector<T> vector;
    std::memcpy(&vector, from, WIDTH);
    return vector;
}

// A matrix [height, width] (or its transpose) in tiles [height, COLUMNS] one after another, zeros in place of what lacks.
template <typename T>
void tile(const T* matrix, int64_t height, int64_t width, bool transposed, std::vector<T>& tiles) {
    const int64_t count = (width + COLUMNS<T> - 1) / COLUMNS<T>;
    tiles.assign(count * height * COLUMNS<T>, T(0));
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++)
            tiles[(x / COLUMNS<T> * height + y) * COLUMNS<T> + x % COLUMNS<T>] =
                matrix[transposed ? x * height + y : y * width + x];
}

// Write the part of a tile that lies inside a matrix of the given width; `rows` and `columns` are what is left of it.
template <typename T>
void store(const Vector<T> (&sums)[ROWS][VECTORS], T* out, int64_t width, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < std::min<int64_t>(ROWS, rows); r++)
        std::memcpy(out + r * width, &sums[r], std::min<int64_t>(COLUMNS<T>, columns) * sizeof(T));
}

// Call work(patch, first row, last row, whether the patch is new to this thread) until all rows are done.
template <typename Make> void in_parallel(int64_t patches, int64_t rows, int threads, Make make) {
    const int64_t strips = (rows + STRIP - 1) / STRIP, total = patches * strips;
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, total));
    auto run = [&](int64_t worker) {
        auto work = make();
        int64_t last = -1;
        for (int64_t unit = total * worker / workers; unit < total * (worker + 1) / workers; unit++) {
            const int64_t patch = unit / strips, first = unit % strips * STRIP;
            work(patch, first, std::min(first + STRIP, rows), patch != last);
            last = patch;
        }
    };
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < workers; worker++) others.emplace_back(run, worker);
    run(0);
    for (auto& other : others) other.join();
}

// out[p, i, j] = sum over d of |student[p, i, d] - teacher[p, j, d]|
template <typename T>
void distances(const T* student, const T* teacher, T* out, int64_t patches, int64_t rows, int64_t depth, int threads) {
    in_parallel(patches, rows, threads, [=] {
        return [=, tiles = std::vector<T>()](int64_t p, int64_t first, int64_t last, bool is_new) mutable {
            if (is_new) tile(teacher + p * rows * depth, depth, rows, true, tiles);
            for (int64_t j = 0; j < rows; j += COLUMNS<T>)
                for (int64_t i = first; i < last; i += ROWS) {
                    const T* s[ROWS];
                    for (int r = 0; r < ROWS; r++) s[r] = student + (p * rows + std::min(i + r, rows - 1)) * depth;
                    Vector<T> sums[ROWS][VECTORS] = {};
                    const T* t = tiles.data() + j * depth;
                    for (int64_t d = 0; d < depth; d++, t += COLUMNS<T>)
                        for (int v = 0; v < VECTORS; v++) {
                            const Vector<T> column = load(t + v * LANES<T>);
                            for (int r = 0; r < ROWS; r++)
                                sums[r][v] += (Vector<T>)((Bits<T>)(s[r][d] - column) & ~Simd<T>::SIGN);
                        }
                    store<T>(sums, out + (p * rows + i) * rows + j, rows, last - i, rows - j);
                }
        };
    });
}

// out[p, i, d] = sum over j of weights[p, i, j] * sign(student[p, i, d] - teacher[p, j, d]), sign(0) = 0
template <typename T>
void weighted_signs(const T* weights, const T* student, const T* teacher, T* out, int64_t patches, int64_t rows,
                    int64_t depth, int threads) {
    in_parallel(patches, rows, threads, [=] {
        return [=, tiles = std::vector<T>(), own = std::vector<T>()](int64_t p, int64_t first, int64_t last,
                                                                     bool is_new) mutable {
            if (is_new) {
                tile(teacher + p * rows * depth, rows, depth, false, tiles);
                tile(student + p * rows * depth, rows, depth, false, own);
            }
            for (int64_t d = 0; d < depth; d += COLUMNS<T>)
                for (int64_t i = first; i < last; i += ROWS) {
                    const T* w[ROWS];
                    Vector<T> sums[ROWS][VECTORS] = {}, s[ROWS][VECTORS];
                    for (int r = 0; r < ROWS; r++) {
                        const int64_t row = std::min(i + r, rows - 1);
                        w[r] = weights + (p * rows + row) * rows;
                        for (int v = 0; v < VECTORS; v++)
                            s[r][v] = load(own.data() + d * rows + row * COLUMNS<T> + v * LANES<T>);
                    }
                    const T* t = tiles.data() + d * rows;
                    for (int64_t j = 0; j < rows; j++, t += COLUMNS<T>)
                        for (int v = 0; v < VECTORS; v++) {
                            const Vector<T> column = load(t + v * LANES<T>);
                            for (int r = 0; r < ROWS; r++) {
                                const Bits<T> weight = (Bits<T>)(Vector<T>{} + w[r][j]);
                                const Bits<T> sign = (Bits<T>)(s[r][v] - column) & Simd<T>::SIGN;
                                const Vector<T> sum = sums[r][v] + (Vector<T>)(weight ^ sign);
                                sums[r][v] = s[r][v] != column ? sum : sums[r][v];
                            }
                        }
                    store<T>(sums, out + (p * rows + i) * depth + d, depth, last - i, depth - d);
                }
        };
    });
}

}  // namespace

#define EXPORT(TYPE, NAME)                                                                                            \
    extern "C" void l1_distances_##NAME(const TYPE* student, const TYPE* teacher, TYPE* out, int64_t patches,         \
                                        int64_t rows, int64_t depth, int threads) {                                  \
        distances(student, teacher, out, patches, rows, depth, threads);                                             \
    }                                                                                                                 \
    extern "C" void weighted_signs_##NAME(const TYPE* weights, const TYPE* student, const TYPE* teacher, TYPE* out,   \
                                          int64_t patches, int64_t rows, int64_t depth, int threads) {               \
        weighted_signs(weights, student, teacher, out, patches, rows, depth, threads);                               \
    }
EXPORT(float, float32)
EXPORT(double, float64)
