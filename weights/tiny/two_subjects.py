"""Teaches the embedded model two subjects, in one run and one after the other, and tells whether they mix.

Trains three times from the same settings, train.toml, for the same steps a subject:

    together    one run with [[subjects]]: rows of both subjects in every batch
    first       a run of the first subject alone
    then        a run of the second subject alone, which begins with the model of `first`

and prints, for each model, the likeness of each prompt's pictures to each subject: the cosine of their features to the
mean of 48 drawings of the subject (see effect.py); other drawings of the subject reach 100 %. Both subjects are learned
where the prompt of each has a high likeness to its own subject. They have not mixed where the likeness to the other one
is no higher than the base model's.

    python weights/tiny/two_subjects.py      # about twenty minutes on two cores

A run that an earlier call left in the same --work-dir is resumed.
"""
