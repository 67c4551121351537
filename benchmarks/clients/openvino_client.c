/* Run a model on images with OpenVINO's C interface: client MODEL.onnx PIXELS.bin LOGITS.bin IMAGES CHANNELS HEIGHT WIDTH */
#include <stdio.h>
#include <stdlib.h>

#include <openvino/c/openvino.h>

#define CHECK(call)                                                                            \
  if ((call) != 0) {                                                                           \
    fprintf(stderr, "Error: %s: %s\n", #call, ov_get_last_err_msg());                          \
    return 1;                                                                                  \
  }

int main(int count, char **words) {
  if (count != 8) return 2;
  ov_core_t *core;
  ov_compiled_model_t *compiled;
  ov_infer_request_t *request;
  int64_t sides[4] = {1, atoi(words[5]), atoi(words[6]), atoi(words[7])};
  size_t size = (size_t)(sides[1] * sides[2] * sides[3]);
  float *pixels = malloc(size * sizeof(float));
  FILE *given = fopen(words[2], "rb"), *made = fopen(words[3], "wb");
  if (!given || !made || !pixels) return 2;
  ov_shape_t shape;
  ov_tensor_t *input, *output;
  CHECK(ov_core_create(&core));
  /* Without the hint, OpenVINO computes in bf16 on processors that support it. */
  CHECK(ov_core_compile_model_from_file(core, words[1], "CPU", 2, &compiled, "INFERENCE_PRECISION_HINT", "f32"));
  CHECK(ov_compiled_model_create_infer_request(compiled, &request));
  CHECK(ov_shape_create(4, sides, &shape));
  CHECK(ov_tensor_create_from_host_ptr(F32, shape, pixels, &input));
  for (int image = 0; image < atoi(words[4]); image++) {
    if (fread(pixels, sizeof(float), size, given) != size) return 2;
    CHECK(ov_infer_request_set_tensor(request, "pixel_values", input));
    CHECK(ov_infer_request_infer(request));
    CHECK(ov_infer_request_get_tensor(request, "logits", &output));
    void *logits;
    size_t classes;
    CHECK(ov_tensor_data(output, &logits));
    CHECK(ov_tensor_get_size(output, &classes));
    fwrite(logits, sizeof(float), classes, made);
    ov_tensor_free(output);
  }
  return fclose(made);
}
