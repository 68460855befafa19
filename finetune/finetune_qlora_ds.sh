#!/bin/sh
# Q-LoRA (adapters on a 4-bit checkpoint) in several processes (DeepSpeed ZeRO 2).
set -eu
MODEL=checkpoints/qwen-tiny-chat-int4
MANY=yes
. "$(dirname "$0")/launch.sh"

launch \
    --model_name_or_path "$MODEL" --data_path "$DATA" --output_dir "$OUTPUT" \
    --use_lora True --q_lora True --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 3e-4 \
    --deepspeed "$ROOT/finetune/ds_config_zero2.json" \
    --num_train_epochs 5 --weight_decay 0.1 --adam_beta2 0.95 --warmup_steps 0.01 --lr_scheduler_type cosine \
    --model_max_length 512 --activation_checkpointing True --lazy_preprocess True \
    --logging_steps 1 --save_strategy steps --save_steps 1000 --save_total_limit 10 \
    "$@"
