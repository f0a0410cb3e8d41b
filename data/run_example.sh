#!/usr/bin/env bash
# Goes through the whole suite once, with the example images, and says what each step does and why.
#
#     bash data/run_example.sh [options of train_unet.py]
#
# Takes less than five minutes on two cores. A second run takes what the first one left in data/example.
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

explain "1/5 packages" "TensorFlow and what else is missing go into .venv, unless an environment is active already. \
The first time takes a few minutes."
. data/environment.sh requirements.txt
start=$SECONDS

explain "2/5 images and masks become databases" "Training reads images in random order for hours: one memory-mapped file \
serves that faster than a folder. Whatever is wrong with the files comes out here, before any GPU waits. A fifth of the \
images is set apart for testing: the network never learns from them, so they tell how well it does on new ones."
if [ -e "$out/train-cells.lmdb" ] && [ -e "$out/test-cells.lmdb" ]; then
    echo "   taking $out/train-cells.lmdb and $out/test-cells.lmdb, which are there already"
else
    run python build_lmdb.py --image_folder data/images --mask_folder data/masks --output_folder "$out" --dataset_name cells
fi

explain "3/5 a network learns" "It has 8 features at its top level instead of 64, so that this takes minutes without a GPU. \
A step shows it a batch of 4 images, each turned, stretched, blurred and so on at random. Every 40 steps it is tested; the \
network with the lowest test loss is kept. Dice is the overlap with the true mask: 0 none, 1 perfect."
run python train_unet.py --train_database "$out/train-cells.lmdb" --test_database "$out/test-cells.lmdb" \
    --output_dir "$out/training" --baseline_feature_depth 8 --learning_rate 2e-3 --test_every_n_steps 40 --max_epochs 4 "$@"

explain "4/5 the network segments images" "Each image gets a mask of the same name and size, in which every pixel is the \
number of its class. Images that have their mask already are skipped."
if [ "$out/training/saved_model" -nt "$out/masks" ]; then
    rm -rf "$out/masks" # those of an earlier network
fi
run python inference_unet.py --saved_model_filepath "$out/training/saved_model" --image_folder data/images \
    --output_folder "$out/masks" --save_overlay 1

explain "5/5 how good are they?" "Only the test images count here."
run python data/draw_example.py --test_database "$out/test-cells.lmdb" --image_folder data/images --mask_folder data/masks \
    --predicted_folder "$out/masks" --output "$out/result.png"

cat <<END

Done in $((SECONDS - start)) s, without step 1. Look at
  image, truth, prediction   $PWD/$out/result.png
  curves of the training     $PWD/$out/training/curves.png, figures in metrics.csv beside it
  the same in a browser      $(printf '%q --logdir %q' "$(command -v tensorboard)" "$PWD/$out/training")
  outlines over each image   $PWD/$out/masks/overlays
  the masks                  $PWD/$out/masks (classes 0 and 1: most viewers show them as black)
END
