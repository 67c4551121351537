"""The configuration of publish --for triton, in the parser of tritonclient."""

ENVIRONMENTS = {"Triton parser": ["numpy", "tritonclient[grpc]"]}
BUNDLES = True


def scores(folder, images):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    [path] = (folder / "triton").glob("*/config.pbtxt")
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    graph = path.parent / "1" / (config.default_model_filename or "model.onnx")
    assert graph.read_bytes() == (folder / "onnx/model.onnx").read_bytes()
    return f"parsed: {config.backend}, {config.input[0].name} {list(config.input[0].dims)}"
