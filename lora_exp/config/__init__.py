"""A config: composed, settled, judged; it never imports torch.

signature       what a target takes, from source
door            the one door to `_target_`
initialization  how LoRA's weights begin
overrides       an override's key and value
deletions       what `~key` leaves to defaults
words           other tools' words, and ours
start           the adapter a run starts from
resume          what may change on resume
keep            the weights that a run saves
settled         plain values, a name, a fingerprint
ranges          numbers that train nothing
learning        settings that learn nothing
arguments       mistakes inside arguments, missing packages
owned           arguments that a run sets itself
pairs           what does not work together
sweeping        Hydra's section of a sweep
mistakes        wrong overrides in our words
validation      every fault of a config
completion      what a shell completes
composition     groups and overrides to a config
"""

from lora_exp.files.paths import asset as asset  # model cards say so
