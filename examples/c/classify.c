/* Classify camera frames with a bundle whose graph resizes, normalizes and selects the best classes by itself:
 *
 *   swin-deploy export ... --embed-resize 480x640 --embed-postprocess top-k
 *   classify swinv2-tiny/onnx/model.onnx swinv2-tiny/labels.txt frame.ppm ...
 *
 * A frame is bytes [height, width, 3] in RGB, here from a binary PPM file. It must have the size of --embed-resize.
 * OpenVINO runs the graph; with -DUSE_ONNXRUNTIME, ONNX Runtime does. README.md has the commands that compile this file. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 32768 /* classes that the graph may select */
#define CHECK(good, what) do { if (!(good)) { fprintf(stderr, "%s failed\n", what); exit(1); } } while (0)

#ifdef USE_ONNXRUNTIME
#include <onnxruntime_c_api.h>

static const OrtApi *api;
static OrtSession *session;

static void checked(OrtStatus *status) {
    if (status == NULL) return;
    fprintf(stderr, "ONNX Runtime: %s\n", api->GetErrorMessage(status));
    exit(1);
}

static void load(const char *path) {
    OrtEnv *env; OrtSessionOptions *options;
    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    CHECK(api, "Finding the interface of the header in the library");
    checked(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "classify", &env));
    checked(api->CreateSessionOptions(&options));
    checked(api->CreateSession(env, path, options, &session));
}

/* Run the graph and return the number of classes that it selected, best first. */
static size_t run(uint8_t *frame, const int64_t shape[4], int64_t *indices, float *scores) {
    OrtMemoryInfo *memory; OrtTensorTypeAndShapeInfo *info; OrtValue *input = NULL, *outputs[2] = {NULL, NULL};
    const char *inputs[] = {"pixel_values"}, *names[] = {"indices", "scores"};
    void *found[2]; size_t count;
    checked(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    checked(api->CreateTensorWithDataAsOrtValue(memory, frame, (size_t)(shape[1] * shape[2] * shape[3]), shape, 4,
                                                ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &input));
    checked(api->Run(session, NULL, inputs, (const OrtValue *const *)&input, 1, names, 2, outputs));
    for (int i = 0; i < 2; i++) checked(api->GetTensorMutableData(outputs[i], &found[i]));
    checked(api->GetTensorTypeAndShape(outputs[1], &info));
    checked(api->GetTensorShapeElementCount(info, &count));
    CHECK(count <= MOST, "Reading so many classes");
    memcpy(indices, found[0], count * sizeof *indices);
    memcpy(scores, found[1], count * sizeof *scores);
    for (int i = 0; i < 2; i++) api->ReleaseValue(outputs[i]);
    api->ReleaseTensorTypeAndShapeInfo(info); api->ReleaseValue(input); api->ReleaseMemoryInfo(memory);
    return count;
}
#else
#include <openvino/c/openvino.h>

static ov_infer_request_t *request;

static void checked(ov_status_e status) {
    if (status == OK) return;
    fprintf(stderr, "OpenVINO: %s. %s\n", ov_get_error_info(status), ov_get_last_err_msg());
    exit(1);
}

static void load(const char *path) {
    ov_core_t *core; ov_model_t *model; ov_compiled_model_t *compiled;
    checked(ov_core_create(&core));
    checked(ov_core_read_model(core, path, NULL, &model));
    /* Without the hint, OpenVINO computes in bf16 where the processor can. */
    checked(ov_core_compile_model(core, model, "CPU", 2, &compiled, "INFERENCE_PRECISION_HINT", "f32"));
    checked(ov_compiled_model_create_infer_request(compiled, &request));
}

/* Run the graph and return the number of classes that it selected, best first. */
static size_t run(uint8_t *frame, const int64_t shape[4], int64_t *indices, float *scores) {
    ov_tensor_t *input, *outputs[2]; ov_shape_t sides;
    void *found[2]; size_t count;
    checked(ov_shape_create(4, shape, &sides));
    checked(ov_tensor_create_from_host_ptr(U8, sides, frame, &input));
    checked(ov_infer_request_set_tensor(request, "pixel_values", input));
    checked(ov_infer_request_infer(request));
    checked(ov_infer_request_get_tensor(request, "indices", &outputs[0]));
    checked(ov_infer_request_get_tensor(request, "scores", &outputs[1]));
    for (int i = 0; i < 2; i++) checked(ov_tensor_data(outputs[i], &found[i]));
    checked(ov_tensor_get_size(outputs[1], &count));
    CHECK(count <= MOST, "Reading so many classes");
    memcpy(indices, found[0], count * sizeof *indices);
    memcpy(scores, found[1], count * sizeof *scores);
    for (int i = 0; i < 2; i++) ov_tensor_free(outputs[i]);
    ov_tensor_free(input); ov_shape_free(&sides);
    return count;
}
#endif

int main(int argc, char **argv) {
    static int64_t indices[MOST]; static float scores[MOST]; static char label[MOST][256];
    int height, width, labels = 0;
    CHECK(argc > 3, "Usage: classify MODEL.onnx LABELS.txt FRAME.ppm ...");
    FILE *names = fopen(argv[2], "r");
    CHECK(names, "Opening the labels");
    /* A longer label is cut off; an empty line is an empty label. */
    for (; labels < MOST && fscanf(names, "%255[^\n]%*[^\n]", label[labels]) != EOF; labels++) fgetc(names);
    load(argv[1]);
    for (int number = 3; number < argc; number++) {
        FILE *file = fopen(argv[number], "rb");
        CHECK(file && fscanf(file, "P6 %d %d 255", &width, &height) == 2 && fgetc(file) != EOF, "Reading a frame");
        const int64_t shape[] = {1, height, width, 3};
        size_t size = (size_t)height * width * 3;
        uint8_t *frame = malloc(size);
        CHECK(frame && fread(frame, 1, size, file) == size, "Reading a frame");
        fclose(file);
        size_t count = run(frame, shape, indices, scores);
        for (size_t i = 0; i < count; i++)
            printf("%.6f %s\n", scores[i], indices[i] < labels ? label[indices[i]] : "unknown");
        free(frame);
    }
    return 0;
}
