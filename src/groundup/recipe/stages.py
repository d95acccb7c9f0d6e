"""The table of stages: what a recipe or the command line can run."""

from groundup.core.run import Stage

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="corpus",
            config="groundup.recipe.corpus:BuildConfig",
            run="groundup.recipe.corpus:build",
            help="read, clean, deduplicate and split text by file",
            version=2,
        ),
        Stage(
            name="classifier",
            config="groundup.data.classifier:ClassifierConfig",
            run="groundup.data.classifier:train_classifier",
            help="train a quality classifier of texts",
        ),
        Stage(
            name="buckets",
            config="groundup.recipe.buckets:BucketsConfig",
            run="groundup.recipe.buckets:make_buckets",
            help="find the perplexities that cut a text's documents into head, middle and tail",
        ),
        Stage(
            name="tokenizer",
            config="groundup.recipe.configs:TokenizerConfig",
            run="groundup.recipe.texts:train_tokenizer",
            help="train a tokenizer",
            version=2,
        ),
        Stage(
            name="shards",
            config="groundup.recipe.configs:ShardsConfig",
            run="groundup.recipe.texts:tokenize",
            help="turn text into token ids",
        ),
        Stage(
            name="ngram",
            config="groundup.recipe.configs:NGramConfig",
            run="groundup.recipe.texts:count_ngrams",
            help="count the modified Kneser-Ney n-gram: the line to beat",
            version=2,
        ),
        Stage(
            name="plan",
            config="groundup.recipe.configs:PlanConfig",
            run="groundup.recipe.planning:plan",
            help="time this machine; choose size, batch, rate and steps",
            version=2,
        ),
        Stage(
            name="ladder",
            config="groundup.recipe.configs:LadderConfig",
            run="groundup.recipe.ladder:ladder",
            help="train three small models and extrapolate the large one's loss",
        ),
        Stage(
            name="pretrain",
            config="groundup.recipe.configs:PretrainConfig",
            run="groundup.recipe.pretraining:pretrain",
            help="train the network on next tokens",
            version=2,
        ),
        Stage(
            name="chats",
            config="groundup.data:ChatsConfig",
            run="groundup.data:build_chats",
            help="write conversations whose answers can be known from the prompt",
        ),
        Stage(
            name="finetune",
            config="groundup.recipe.configs:FinetuneConfig",
            run="groundup.recipe.tuning:finetune",
            help="fine-tune on conversations, loss on the answers only",
            version=3,
        ),
        Stage(
            name="cloze",
            config="groundup.data.cloze:ClozeConfig",
            run="groundup.recipe.texts:make_cloze",
            help="make questions out of plain text, in SQuAD's form",
        ),
        Stage(
            name="reading",
            config="groundup.recipe.configs:ReadingConfig",
            run="groundup.recipe.reading:read_spans",
            help="fine-tune an encoder to point at answers (SQuAD's files)",
        ),
        Stage(
            name="preferences",
            config="groundup.recipe.configs:PreferencesConfig",
            run="groundup.recipe.tuning:make_preferences",
            help="pair good answers with worse ones of matched length",
        ),
        Stage(
            name="align",
            config="groundup.recipe.configs:AlignConfig",
            run="groundup.recipe.tuning:align",
            help="align to the preferences (DPO)",
            version=3,
        ),
        Stage(
            name="evaluate",
            config="groundup.recipe.configs:EvaluateConfig",
            run="groundup.recipe.evaluation:evaluate",
            help="measure three models, the answers and the preferences, held out",
            version=2,
        ),
        Stage(
            name="classify",
            config="groundup.recipe.configs:ClassifyConfig",
            run="groundup.recipe.classifying:classify",
            help="train and compare classifiers, generative and discriminative",
        ),
        Stage(
            name="report",
            config="groundup.recipe.configs:ReportConfig",
            run="groundup.recipe.reporting:report",
            help="write report.html",
        ),
    )
}
