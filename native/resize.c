/* Bilinear resizing with anti-aliasing, for cnnray.images.resize: the arithmetic of Pillow 13 (src/libImaging/Resample.c,
 * MIT-CMU licence), so that every pixel is equal, in loops that compilers turn into vector instructions.
 *
 * An image is resized in two passes, one for each direction. A pixel of a pass is a weighted sum of the neighbouring
 * pixels of its input, in fixed point with 22 bits behind the point, and rounded to 8 bits.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The best version for the CPU is chosen when the module is loaded. */
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

#define BITS 22
#define HALF (1 << (BITS - 1))
#define CHANNELS 4 /* of the input, as Pillow keeps RGB: the fourth is not used */
#define ROWS 8     /* that the horizontal pass takes at once */
#define LANES (ROWS * CHANNELS)

typedef struct {
    int size;         /* pixels of the output */
    int taps;         /* most weights of a pixel */
    int *first;       /* for each pixel of the output, its first pixel of the input, */
    int *count;       /* the number of them, */
    int32_t *weights; /* and their weights, each pixel's behind `taps` others */
} Kernels;

static void free_kernels(Kernels *kernels) {
    free(kernels->first);
    free(kernels->count);
    free(kernels->weights);
}

/* The weights for the part from `start` to `end` of an input of `in_size` pixels. Returns -1 without memory. */
static int make_kernels(Kernels *kernels, int in_size, float start, float end, int size) {
    double scale = (double)(end - start) / size;
    double support = scale < 1.0 ? 1.0 : scale;
    double per_support = 1.0 / support;
    int taps = (int)ceil(support) * 2 + 1;
    double *weights = malloc(sizeof(double) * taps);
    *kernels = (Kernels){
        size,
        taps,
        malloc(sizeof(int) * size),
        malloc(sizeof(int) * size),
        calloc((size_t)size * taps, sizeof(int32_t)),
    };
    if (!weights || !kernels->first || !kernels->count || !kernels->weights) {
        free(weights);
        free_kernels(kernels);
        return -1;
    }
    for (int i = 0; i < size; i++) {
        double center = start + (i + 0.5) * scale, sum = 0.0;
        int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
        first = first < 0 ? 0 : first;
        last = last > in_size ? in_size : last;
        for (int k = 0; k < last - first; k++) {
            double distance = fabs((k + first - center + 0.5) * per_support);
            weights[k] = distance < 1.0 ? 1.0 - distance : 0.0;
            sum += weights[k];
        }
        for (int k = 0; k < last - first; k++) {
            double weight = sum != 0.0 ? weights[k] / sum : weights[k];
            kernels->weights[(size_t)i * taps + k] = (int32_t)(0.5 + weight * (1 << BITS));
        }
        kernels->first[i] = first;
        kernels->count[i] = last - first;
    }
    free(weights);
    return 0;
}

/* Pixels of four channels to pixels of three, which lie `out_stride` bytes apart from row to row. The byte behind a row
 * is overwritten. Eight rows are laid side by side first, so that the inner loops run over neighbouring bytes.
 */
FOR_EACH_CPU
static void resize_rows(const uint8_t *restrict in, Py_ssize_t in_width, Py_ssize_t rows, uint8_t *restrict out,
                        Py_ssize_t out_stride, const Kernels *restrict kernels, uint32_t *restrict columns) {
    Py_ssize_t in_stride = in_width * CHANNELS;
    for (Py_ssize_t y = 0; y < rows; y += ROWS) {
        Py_ssize_t count = rows - y < ROWS ? rows - y : ROWS;
        for (Py_ssize_t i = 0; i < ROWS; i += 4) {
            const uint32_t *restrict row[4];
            for (Py_ssize_t j = 0; j < 4; j++) /* behind the last row, that row again */
                row[j] = (const uint32_t *)(in + (y + (i + j < count ? i + j : count - 1)) * in_stride);
            const uint32_t *restrict a = row[0], *restrict b = row[1], *restrict c = row[2], *restrict d = row[3];
            for (Py_ssize_t x = 0; x < in_width; x++) {
                columns[ROWS * x + i] = a[x];
                columns[ROWS * x + i + 1] = b[x];
                columns[ROWS * x + i + 2] = c[x];
                columns[ROWS * x + i + 3] = d[x];
            }
        }
        for (Py_ssize_t x = 0; x < kernels->size; x++) {
            const int32_t *weights = kernels->weights + x * kernels->taps;
            const uint8_t *pixels = (const uint8_t *)columns + (Py_ssize_t)kernels->first[x] * LANES;
            Py_ssize_t taps = kernels->count[x];
            int32_t sums[LANES];
            uint8_t rounded[LANES];
            for (Py_ssize_t i = 0; i < LANES; i++) sums[i] = HALF;
            for (Py_ssize_t k = 0; k < taps; k++)
                for (Py_ssize_t i = 0; i < LANES; i++) sums[i] += pixels[k * LANES + i] * weights[k];
            for (Py_ssize_t i = 0; i < LANES; i++) rounded[i] = (uint8_t)(sums[i] >> BITS);
            for (Py_ssize_t i = 0; i < count; i++) memcpy(out + (y + i) * out_stride + 3 * x, rounded + CHANNELS * i, CHANNELS);
        }
    }
}

/* Rows of `length` bytes, in both cases, that lie `in_stride` and `out_stride` bytes apart. */
FOR_EACH_CPU
static void resize_columns(const uint8_t *restrict in, Py_ssize_t in_stride, uint8_t *restrict out,
                           Py_ssize_t out_stride, Py_ssize_t length, const Kernels *restrict kernels) {
    for (Py_ssize_t y = 0; y < kernels->size; y++) {
        const int32_t *weights = kernels->weights + y * kernels->taps;
        const uint8_t *rows = in + kernels->first[y] * in_stride;
        uint8_t *row = out + y * out_stride;
        Py_ssize_t taps = kernels->count[y];
        Py_ssize_t x = 0;
        for (; x + LANES <= length; x += LANES) {
            int32_t sums[LANES];
            for (Py_ssize_t i = 0; i < LANES; i++) sums[i] = HALF;
            for (Py_ssize_t k = 0; k < taps; k++) {
                const uint8_t *pixels = rows + k * in_stride + x;
                for (Py_ssize_t i = 0; i < LANES; i++) sums[i] += pixels[i] * weights[k];
            }
            for (Py_ssize_t i = 0; i < LANES; i++) row[x + i] = (uint8_t)(sums[i] >> BITS);
        }
        for (; x < length; x++) {
            int32_t sum = HALF;
            for (Py_ssize_t k = 0; k < taps; k++) sum += rows[k * in_stride + x] * weights[k];
            row[x] = (uint8_t)(sum >> BITS);
        }
    }
}

/* Returns -1 without memory. */
static int resize_image(const uint8_t *in, int in_width, int in_height, const float box[4], uint8_t *out, int width,
                        int height) {
    Kernels across, down;
    if (make_kernels(&across, in_width, box[0], box[2], width)) return -1;
    if (make_kernels(&down, in_height, box[1], box[3], height)) {
        free_kernels(&across);
        return -1;
    }
    Py_ssize_t in_stride = (Py_ssize_t)in_width * CHANNELS;
    Py_ssize_t out_stride = (Py_ssize_t)width * 3, padded = out_stride + 1;
    int is_down_first = in_height > height && in_height - height > 2 * (in_width - width);
    /* Of the input, the rows that the vertical pass reads. */
    int first = down.first[0], rows = down.first[height - 1] + down.count[height - 1] - first;
    uint8_t *between = malloc(is_down_first ? height * (in_stride + padded) : rows * padded);
    uint32_t *columns = malloc(in_stride * ROWS);
    int result = between && columns ? 0 : -1;
    if (!result && is_down_first) {
        uint8_t *packed = between + height * in_stride;
        resize_columns(in, in_stride, between, in_stride, in_stride, &down);
        resize_rows(between, in_width, height, packed, padded, &across, columns);
        for (int y = 0; y < height; y++) memcpy(out + y * out_stride, packed + y * padded, out_stride);
    } else if (!result) {
        for (int y = 0; y < height; y++) down.first[y] -= first;
        resize_rows(in + first * in_stride, in_width, rows, between, padded, &across, columns);
        resize_columns(between, padded, out, out_stride, out_stride, &down);
    }
    free(columns);
    free(between);
    free_kernels(&across);
    free_kernels(&down);
    return result;
}

static PyObject *resize(PyObject *self, PyObject *args) {
    Py_buffer in, out;
    int in_width, in_height, width, height, result = 0;
    float box[4];
    if (!PyArg_ParseTuple(args, "y*(ii)(ffff)w*(ii)", &in, &in_width, &in_height, box, box + 1, box + 2, box + 3, &out,
                          &width, &height))
        return NULL;
    int fits = in_width > 0 && in_height > 0 && width > 0 && height > 0 && box[0] >= 0 && box[0] < box[2] &&
               box[2] <= in_width && box[1] >= 0 && box[1] < box[3] && box[3] <= in_height &&
               in.len == (Py_ssize_t)in_width * in_height * CHANNELS && out.len == (Py_ssize_t)width * height * 3;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        result = resize_image(in.buf, in_width, in_height, box, out.buf, width, height);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    if (!fits) return PyErr_Format(PyExc_ValueError, "the sizes do not fit the buffers, or the box the image");
    if (result) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"resize", resize, METH_VARARGS,
     "resize(pixels, (width, height), box, out, (out_width, out_height))\n\n"
     "Resize the box (left, top, right, bottom) of an image of four bytes a pixel into one of three bytes a pixel."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cnnray_resize", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__cnnray_resize(void) { return PyModule_Create(&module); }
