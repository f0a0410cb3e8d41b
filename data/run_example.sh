#!/usr/bin/env bash
# Builds databases from the example images, trains a small network, segments the images, and draws the result.
# Works in .venv beside this folder unless an environment is active already; takes a few minutes on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== 1/5 installing what is missing (the first time takes a few minutes)"
. data/environment.sh requirements.txt

out=data/example
rm -rf "$out"
start=$SECONDS
echo "== 2/5 images and masks -> a train and a test database"
python build_lmdb.py --image_folder data/images --mask_folder data/masks --output_folder "$out" --dataset_name cells
echo "== 3/5 training a small network (8 features instead of 64, so that it takes minutes without a GPU)"
python train_unet.py --train_database "$out/train-cells.lmdb" --test_database "$out/test-cells.lmdb" \
    --output_dir "$out/training" --baseline_feature_depth 8 --learning_rate 2e-3 --test_every_n_steps 40 --max_epochs 7
echo "== 4/5 segmenting the images"
python inference_unet.py --saved_model_filepath "$out/training/saved_model" --image_folder data/images \
    --output_folder "$out/masks"
echo "== 5/5 comparing with the true masks"
python data/draw_example.py --test_database "$out/test-cells.lmdb" --image_folder data/images --mask_folder data/masks \
    --predicted_folder "$out/masks" --output "$out/result.png"
cat <<END
done in $((SECONDS - start)) s. Look at
  $PWD/$out/result.png       image, truth and prediction of four test images
  $PWD/$out/training         metrics.csv, saved_model; tensorboard --logdir $PWD/$out/training
  $PWD/$out/masks            a mask for each image (class ids 0 and 1: it looks black in most viewers)
END
