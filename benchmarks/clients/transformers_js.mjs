// Classify images with transformers.js in Node.
//
//     npm install @huggingface/transformers
//     node benchmarks/clients/transformers_js.mjs FOLDER BUNDLE IMAGE ...
//
// FOLDER has the bundle as a subfolder of this name. Prints a JSON object for each image. transformers.js has no class for
// Swin V2, whose graphs have the inputs and outputs of V1: its config names the class of V1.
import { AutoConfig, env, pipeline } from "@huggingface/transformers";

const [folder, bundle, ...images] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const config = await AutoConfig.from_pretrained(bundle);
if (config.model_type === "swinv2") config.model_type = "swin";
const classify = await pipeline("image-classification", bundle, { config });
for (const image of images) {
  const scores = await classify(image, { top_k: null });
  console.log(JSON.stringify({ image, label: scores[0].label, score: scores[0].score, scores }));
}
