#!/usr/bin/env bash
# Run the entire suite once on the example images, and explain each step.
#
#     bash data/run_example.sh [options of train_unet.py]
#
# This takes about three minutes on two cores. A second run reuses the results in data/example.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=data/example

explain() {
    printf '\n== %s\n' "$1"
    printf '%s\n' "$2" | fold -s -w 100 | sed 's/^/   /'
}
run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

explain "1/5 packages" "TensorFlow and other missing packages are installed into .venv, unless an environment is \
already active. This takes a few minutes the first time."
. data/environment.sh requirements.txt
start=$SECONDS

explain "2/5 build databases from images and masks" "Training reads images in random order for hours, which is faster from one \
memory-mapped file than from a folder. Any problems with the files show up here, before a GPU has to wait. A fifth of the \
images is set aside for testing. The network never learns from them, so they show how well it does on new images."
if [ -e "$out/train-cells.lmdb" ] && [ -e "$out/test-cells.lmdb" ]; then
    echo "   using $out/train-cells.lmdb and $out/test-cells.lmdb, which already exist"
else
    run python build_lmdb.py --image_folder data/images --mask_folder data/masks --output_folder "$out" --dataset_name cells
fi

explain "3/5 train a network" "The network has 8 features at its top level instead of 64, so that training takes only minutes \
without a GPU. Each step uses a batch of 4 images, which are randomly rotated, stretched, blurred and so on. The network is \
tested every 50 steps, and the one with the lowest test loss is kept. Dice measures the overlap with the true mask, from 0 \
(none) to 1 (perfect)."
run python train_unet.py --train_database "$out/train-cells.lmdb" --test_database "$out/test-cells.lmdb" \
    --output_dir "$out/training" --baseline_feature_depth 8 --learning_rate 4e-3 --test_every_n_steps 50 --max_epochs 4 "$@"

explain "4/5 segment images" "Each image gets a mask of the same name and size, in which each pixel value is the number of a \
class. Images that already have a mask are skipped."
if [ "$out/training/saved_model" -nt "$out/masks" ]; then
    rm -rf "$out/masks" # masks of an earlier network
fi
run python inference_unet.py --saved_model_filepath "$out/training/saved_model" --image_folder data/images \
    --output_folder "$out/masks" --save_overlay 1

explain "5/5 compare with true masks" "Only the test images count here."
run python data/draw_example.py --test_database "$out/test-cells.lmdb" --image_folder data/images --mask_folder data/masks \
    --predicted_folder "$out/masks" --output "$out/result.png"

cat <<END

Done in $((SECONDS - start)) s, not counting step 1. Results:
  image, truth, prediction   $PWD/$out/result.png
  training curves            $PWD/$out/training/curves.png, with the numbers in metrics.csv next to it
  the same in a browser      $(printf '%q --logdir %q' "$(command -v tensorboard)" "$PWD/$out/training")
  outlines over each image   $PWD/$out/masks/overlays
  the masks                  $PWD/$out/masks (classes 0 and 1: most viewers show them as black)
END
