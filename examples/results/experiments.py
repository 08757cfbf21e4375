"""The experiments of docs/results.md."""

from typing import Dict

import torch
from experiment import PLAIN, Experiment, Options
from with_fairseq import MASKED_LM, TRANSLATION, MaskedLM, Translation
from with_timm import Images
from with_transformers import FineTuning

EVOLVING: Options = {"alpha": 0.1, "beta": 0.1}
PARTS = {"residual": {"alpha": 0.1, "beta": 0.0}, "convolution": {"alpha": 0.0, "beta": 0.1}}
FAIRSEQ_SETTINGS = {"plain": PLAIN, "evolving": EVOLVING}
TIMM_SETTINGS = {"plain": PLAIN, "evolving": {"alpha": 0.5, "beta": 1.0}}
ABLATIONS = PARTS | {
    "kernel-1": EVOLVING | {"kernel_size": 1},
    "kernel-5": EVOLVING | {"kernel_size": 5},
    "alpha-0.3": EVOLVING | {"alpha": 0.3},
    "alpha-0.5": EVOLVING | {"alpha": 0.5},
    "beta-0.3": EVOLVING | {"beta": 0.3},
    "beta-0.5": EVOLVING | {"beta": 0.5},
    "learned": EVOLVING | {"learnable": True},
    "identity": EVOLVING | {"start": "identity"},
    "encoder": EVOLVING | {"attentions": "encoder"},
    "decoder": EVOLVING | {"attentions": "decoder"},
    "cross": EVOLVING | {"attentions": "cross"},
    "centred-keys": EVOLVING | {"keys": "centred"},
}
# A released model has weights that were trained with plain maps.
RELEASED_SETTINGS = (
    FAIRSEQ_SETTINGS
    | PARTS
    | {
        "learned-from-0": PLAIN | {"learnable": True, "ea_lr": 1e-3},
        "both-0.2": {"alpha": 0.2, "beta": 0.2},
        "both-0.4": {"alpha": 0.4, "beta": 0.4},
    }
)
# Other ways to start from them, and what a large weight does.
RELEASED_ABLATIONS = {
    "identity": ABLATIONS["identity"],
    "shifted-learned": {
        "alpha": 0.0,
        "beta": 0.1,
        "learnable": True,
        "ea_lr": 1e-3,
        "start": "shifted",
    },
    "warm-up": EVOLVING | {"warmup": 0.5},
    "residual-0.4": {"alpha": 0.4, "beta": 0.0},
    "convolution-0.4": {"alpha": 0.0, "beta": 0.4},
}
SMALL_VIT = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3)
MINILM = (
    "all-MiniLM-L6-v2 (a BERT with 6 layers of width 384 and 12 heads, already tuned to embed "
    "sentences), fine-tuned with AdamW "
)
MASKED_LM_SCORES = ("validation loss, bits", "CoLA, Matthews correlation, %", "RTE, accuracy, %")
BLEUS = ("BLEU test_2016_flickr", "BLEU test_2017_flickr")
ROBERTA = "RoBERTa with 4 layers of width 128 and 4 heads, "
PER_MASKED_TOKEN = " The loss is in bits per masked token."
SMOOTHED = (
    " The validation loss is the training criterion: cross-entropy with label smoothing of 0.1, in "
    "bits per token."
)

EXPERIMENTS: Dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        MaskedLM(
            name="masked-lm-captions",
            title="Masked language modelling, Multi30k captions",
            about=ROBERTA + "1,000 updates of 2,048 tokens with Adam, learning rate 2e-3, on the "
            "English side of Multi30k (29,000 captions, vocabulary of 4,000)." + PER_MASKED_TOKEN,
            scores=("validation loss, bits",),
            lower_is_better=True,
            settings=FAIRSEQ_SETTINGS
            | {
                name: ABLATIONS[name]
                for name in ("residual", "convolution", "alpha-0.5", "beta-0.5")
            },
            seeds=(1, 2, 3, 4, 5),
            default="beta-0.5",
            plain_arch="roberta",
            arch="ea_roberta",
            recipe=f"{MASKED_LM} --max-tokens 2048 --warmup-updates 100 --total-num-update 1000",
            updates=1000,
            every=100,
        ),
        MaskedLM(
            name="masked-lm-glue",
            title="Masked language modelling, then fine-tuning, CoLA and RTE",
            about=ROBERTA + "3,000 updates of 1,024 tokens with Adam, learning rate 2e-3, on the "
            "training sentences of CoLA and RTE (vocabulary of 4,000); then 6 epochs of "
            "fine-tuning on either task, scored after the last. The learning rate falls to 0 over "
            "these few updates, so the validation loss says which model learns faster, not where "
            "longer runs would end. RTE stays near chance: always predicting the majority class "
            "gives 52.7 %." + PER_MASKED_TOKEN,
            scores=MASKED_LM_SCORES,
            headline=MASKED_LM_SCORES,
            lower_is_better=True,
            settings=FAIRSEQ_SETTINGS | {"beta-0.5": ABLATIONS["beta-0.5"]},
            seeds=(1, 2, 3, 4, 5),
            default="beta-0.5",
            plain_arch="roberta",
            arch="ea_roberta",
            recipe=f"{MASKED_LM} --max-tokens 1024 --warmup-updates 300 --total-num-update 3000",
            updates=3000,
            every=250,
            tasks=("CoLA", "RTE"),
        ),
        Translation(
            name="translation",
            title="Translation, Multi30k German to English",
            about="Transformer-Lite (6 encoder and 6 decoder layers, width 160, 4 heads), 2,600 "
            "updates of 2,048 tokens with Adam, learning rate 2e-3. BLEU is sacreBLEU's, ignoring "
            "case, of the last checkpoint with beam 5." + SMOOTHED,
            scores=("validation loss, bits", *BLEUS),
            default="beta-0.5",
            headline=BLEUS,
            lower_is_better=True,
            settings=FAIRSEQ_SETTINGS | {"beta-0.5": ABLATIONS["beta-0.5"]},
            seeds=(1, 2, 3),
            plain_arch="transformer",
            arch="ea_transformer",
            recipe=f"{TRANSLATION} --max-tokens 2048",
            updates=2600,
            every=200,
        ),
        Translation(
            name="translation-ablations",
            title="Ablations: the beginning of a translation model's training",
            about="The same Transformer-Lite, two epochs (942 updates of 1,024 tokens)." + SMOOTHED,
            scores=("validation loss, bits",),
            lower_is_better=True,
            settings=FAIRSEQ_SETTINGS | ABLATIONS,
            seeds=(1, 2, 3, 4, 5),
            default="beta-0.5",
            headline=(),
            plain_arch="transformer",
            arch="ea_transformer",
            recipe=f"{TRANSLATION} --max-tokens 1024",
            updates=942,
            every=200,
        ),
        Images(
            name="images",
            title="Image classification, part of CIFAR-10, small ViT",
            about="ViT with 6 blocks of width 96 and 3 heads, patches of 4 pixels, 15,000 training "
            "images with random crops and flips, 6 epochs of AdamW, batches of 64, learning rate "
            "1e-3, label smoothing of 0.1; scored on 5,000 test images.",
            scores=("accuracy, %", "minus cross-entropy"),
            lower_is_better=False,
            settings=TIMM_SETTINGS
            | {
                "both-0.1": EVOLVING,
                "residual": {"alpha": 0.5, "beta": 0.0},
                "convolution": {"alpha": 0.0, "beta": 1.0},
            },
            seeds=(1, 2, 3, 4, 5),
            model="ea_vit_tiny",
            model_options=SMALL_VIT,
            epochs=6,
            batch_size=64,
            lr=1e-3,
        ),
        Images(
            name="images-deit",
            title="Image classification, part of CIFAR-10, small ViT, DeiT-style recipe",
            about="The same ViT, with mixup, CutMix and stochastic depth (0.1), but without "
            "RandAugment and random erasing, for 8 epochs, matrix products in bfloat16.",
            scores=("accuracy, %", "minus cross-entropy"),
            lower_is_better=False,
            settings=TIMM_SETTINGS | {"both-0.1": EVOLVING},
            seeds=(1, 2, 3, 4, 5),
            model="ea_deit_tiny",
            model_options=SMALL_VIT | {"drop_path_rate": 0.1},
            epochs=8,
            batch_size=64,
            lr=1e-3,
            mixes=True,
            precision="medium",
        ),
        Images(
            name="images-resnet",
            title="Image classification, part of CIFAR-10, small attention-augmented ResNet",
            about="The augmented ResNet-50 with 1, 2, 2 and 2 blocks in place of 3, 4, 6 and 3, "
            "half as many channels and 4 heads (3.4 million parameters), images enlarged to 64 "
            "pixels, 5 epochs of AdamW, batches of 64, learning rate 1e-3.",
            scores=("accuracy, %", "minus cross-entropy"),
            lower_is_better=False,
            settings=TIMM_SETTINGS,
            seeds=(1, 2, 3),
            model="ea_resnet50",
            model_options=dict(
                img_size=64, layers=(1, 2, 2, 2), channels=(32, 64, 128, 256), num_heads=4
            ),
            epochs=5,
            batch_size=64,
            lr=1e-3,
            size=64,
            memory_format=torch.channels_last,
        ),
        FineTuning(
            name="released-bert-sts-b",
            title="Fine-tuning a released BERT, STS-B",
            about=MINILM + "for 2 epochs on 4,249 pairs of STS-B's training file, batches of 16, "
            "learning rate 1e-4; scored on the other 1,500 pairs of that file.",
            scores=("Pearson, %", "Spearman, %"),
            lower_is_better=False,
            settings=RELEASED_SETTINGS | RELEASED_ABLATIONS,
            seeds=(1, 2, 3, 4, 5),
            task="STS-B",
            examples=4249,
            epochs=2,
            batch_size=16,
            lr=1e-4,
            max_length=64,
        ),
        FineTuning(
            name="released-bert-cola",
            title="Fine-tuning a released BERT, CoLA",
            about=MINILM
            + "for 2 epochs on the 8,551 in-domain training sentences of CoLA, batches "
            "of 16, learning rate 1e-4, matrix products in bfloat16; scored on the 527 in-domain "
            "validation sentences.",
            scores=("Matthews correlation, %",),
            lower_is_better=False,
            settings=RELEASED_SETTINGS,
            seeds=(1, 2, 3, 4, 5),
            task="CoLA",
            examples=8551,
            epochs=2,
            batch_size=16,
            lr=1e-4,
            max_length=64,
            precision="medium",
        ),
        FineTuning(
            name="released-bert-rte",
            title="Fine-tuning a released BERT, RTE",
            about=MINILM
            + "for 2 epochs on the 2,490 training pairs of RTE, batches of 16, learning "
            "rate 5e-5, matrix products in bfloat16; scored on the 277 pairs of the validation "
            "set (majority class: 52.7 %).",
            scores=("accuracy, %",),
            lower_is_better=False,
            settings=RELEASED_SETTINGS,
            seeds=(1, 2, 3, 4, 5),
            task="RTE",
            examples=2490,
            epochs=2,
            batch_size=16,
            lr=5e-5,
            max_length=128,
            precision="medium",
        ),
    )
}
