"""A config: composed, completed, validated; it never imports torch.

references      keys that decide others' values
signature       what a target takes, from source
door            imports and calls of `_target_`
initialization  how LoRA's weights begin
overrides       an override's key and value
deletions       defaults of keys that `~key` deletes
words           other tools' names, and ours
start           the adapter a run starts from
resume          what may change on resume
trackers        which trackers, and their packages
keep            the weights that a run saves
naming          a run's name
processes       how many, and their shares
sharding        what processes share out
frozen          settled values as a DictConfig
settled         plain values, directory, fingerprint
ranges          numbers that train nothing
learning        settings under which nothing is learnt
arguments       mistakes inside arguments, missing packages
owned           arguments that a run sets itself
named_files     files and commits that it names
pairs           settings that do not work together
stopping        early stopping that cannot work
sweeping        Hydra's section of a sweep
mistakes        Hydra's errors as our own
validation      every fault of a config
completion      shell completion of overrides
composition     a config from groups and overrides
"""

from lora_exp.files.paths import asset as asset  # model cards import it from here
