"""What the columns of tables mean, for readers of a page: MEANINGS, a pattern of field names and a sentence each."""

from __future__ import annotations

import re

MEANINGS = {
    # losses and what is made of them
    r"nll": "Mean loss in nats: a token of a language model, a text of a classifier. Lower is likelier.",
    r"(\w+)_nll": "Mean loss on the {0} set in nats, a token or, of a classifier, a text. Lower is likelier.",
    r"perplexity": "exp of the mean over texts of each text's mean loss a token.",
    r"(\w+_)?token_perplexity": "exp of the loss a token, over all tokens at once.",
    r"retain_perplexity_change": "Change of the retain set's perplexity from the original model's, in percent.",
    r"accuracy": "Percent that is right: of texts, or the mean over texts of that of their next tokens.",
    r"(forget|retain)_accuracy": "Percent of a text's next tokens that the model gets right, mean over the {0} set.",
    r"balanced_accuracy": "Mean over classes of the percent that is right.",
    r"macro_f1": "Mean over classes of F1, in percent.",
    r"majority": "Accuracy of always naming the commonest class, in percent.",
    # unlearning
    r"verdict": "Of a method: whether forget loss is within 10 % of retraining's and retain perplexity under 10 % "
                "above the original's. Of a claim: whether it replicates.",
    r"gap_to_retrained": "Mean over the sets of the distance of the loss to the retrained model's, nats a token; 0 is "
                         "the goal.",
    r"mink(\d+)_auc": "Membership attack on the {0} % least likely tokens: 1 memorised, 0.5 like never seen.",
    r"auc_\w+": "Chance that the attack ranks a never-trained text above a forget text: 1 memorised.",
    r"smia_\w+": "Closeness of the attack's AUC to that on the retrained model; 1 is the goal.",
    r"privleak": "Min-K AUC against the retrained model's, in percent: 0 is retraining, -100 memorised.",
    r"privacy": "Harmonic mean of four sMIA: 1 where attacks see what they see in the retrained model.",
    r"memorisation(_\d+bit)?": "Harmonic mean of 1 - EM, 1 - ES, 1 - ParaProb and 1 - truth: 1 for nothing by heart.",
    r"em": "Share of an answer's tokens that are the likeliest (exact memorisation).",
    r"es(_\d+bit)?": "Share of an answer that is completed without error to its end (extraction strength).",
    r"paraprob": "Probability of the paraphrased answer.",
    r"truth": "Truth ratio T3: the share of the right answer against wrong ones.",
    r"utility(_\d+bit)?": "Model utility under T2: harmonic mean of what should still be known.",
    r"utility_rel": "Utility divided by the original model's, at most 1.",
    r"overall": "Harmonic mean of Memorisation, Privacy and relative Utility.",
    r"forget_quality": "p of a KS test of truth ratios against the retrained model's; above 0.05 no difference.",
    r"forget_quality_d": "Largest distance of the two distributions of truth ratios; 0 is the goal.",
    r"forget_quality_n": "Questions in that test; p falls with them at equal distance.",
    r"tofu_model_utility_t(\d)": "TOFU's model utility with truth ratio T{0}, 0 to 1.",
    r"tofu_(\w+)_probability": "Mean probability of the right answer to {0} questions (against wrong ones, where TOFU "
                               "does so).",
    r"tofu_(\w+)_rouge": "ROUGE-L recall of written answers to {0} questions.",
    r"tofu_forget_truth_ratio_t(\d)": "Truth ratio T{0} on forget questions, min(T, 1 / T): 1 where wrong answers are "
                                      "as likely as the right one.",
    r"tofu_(\w+)_truth_ratio_t(\d)": "Truth ratio T{1} on {0} questions, 1 - T and at least 0: 1 where the right "
                                     "answer is far likelier than wrong ones.",
    r"verbmem": "100 times ROUGE-L F1 of continuations with the forgotten text.",
    r"knowmem_(\w+)": "100 times ROUGE-L F1 of answers to {0} questions.",
    r"criterion": "Harmonic mean of Memorisation and relative Utility on the validation halves; chooses the settings.",
    r"robustness": "Share of the settings tried within 10 % of the best.",
    r"strength": "The method's own knob beside the learning rate.",
    r"diverged": "Runs that ended in losses that are no numbers, of all settings and seeds.",
    # cost
    r"steps": "Optimizer steps.",
    r"seconds": "Wall-clock time.",
    r"train_tokens": "Tokens that training read.",
    r"tokens_per_second": "Training tokens a second.",
    r"flops_vs_retraining": "Arithmetic of the method divided by that of retraining.",
    r"share_of_retraining": "Visits of examples divided by those of training everything that is left.",
    r"examples_revisited": "Examples read again, counted each time.",
    r"stages_retrained": "Slices of shards that were trained again.",
    r"memory_mb": "Memory of the compiled step, MB.",
    r"compile_seconds": "Time of compiling the step.",
    # fairness and leakage
    r"test_sampled_eo_max": "The gap of one random draw of the decisions, where a method decides at random.",
    r"(\w+_)?eo_max": "Equalized-odds gap: the larger difference between groups of true or false positive rates, as a "
                      "share; 0 is fair.",
    r"(\w+_)?eo_avg": "Mean of the differences between groups of true and of false positive rates.",
    r"(\w+_)?demographic_parity": "Difference between groups in how often the positive class is named.",
    r"test_accuracy_noise": "Half of the 95 % bootstrap interval of the accuracy, in points.",
    r"test_eo_max_noise": "Half of the 95 % bootstrap interval of the gap.",
    r"test_(accuracy|eo_max)_change": "Difference from the plain vote on the same test records.",
    r"gap_(lower|higher)": "Share of cases whose gap is {0} by more than resampling explains; chance gives 0.025.",
    r"leakage_(?!\w+_change)(\w+)": "Balanced accuracy of fresh attackers who guess {0} from the embedding, percent.",
    r"floor_(\w+)": "Balanced accuracy of guessing {0} from the true task label alone, percent.",
    r"eo_max_(\w+)": "Equalized-odds gap between the groups of {0}, as a share.",
    r"(accuracy|leakage_\w+)_change": "Difference from the model without modules, in points.",
    r"density": "Budget of a module: the share of the parameters within its reach that it may change.",
    r"achieved_density": "Share of the parameters within its reach that a module changes.",
    r"nonzeros": "Parameters that a module changes.",
    r"bytes": "Size of the module: a place and a value for each of them.",
    # privacy
    r"epsilon": "Bound on the privacy loss at this delta; lower is more private.",
    r"epsilon_rdp": "The same by the second accountant, as a check.",
    r"delta": "Probability with which the bound may fail.",
    r"sigma": "Noise multiplier: standard deviation of the noise divided by the clipping norm.",
    r"q": "Probability that a record is in a batch.",
    r"clip": "Norm to which the gradient of a unit is cut.",
    r"unit": "What is protected: the gradient of one such unit is cut.",
    r"relation": "What makes two data sets neighbours.",
    r"cap": "Most records of a batch.",
    # influence
    r"influence_(\w+)": "Loss of {0} after the dataset is unlearned minus before, or the method's score in its units.",
    r"collapsed_at": "Step at which the model was destroyed.",
    r"collapsed": "Percent of losses out of range.",
    r"pearson": "Correlation of scores with the truth over datasets, averaged over queries.",
    r"spearman": "The same of ranks.",
    r"lds": "Linear datamodeling score: Spearman over random subsets of the datasets.",
    r"sign": "Percent of scores with the sign of the truth.",
    r"sign_centred": "The same after each query's mean is taken from both.",
    r"top_recall": "Percent of the most helpful datasets that the scores name too.",
    r"cost_vs_truth": "Forward tokens (3 for one that is differentiated) of one model's scores, divided by those of "
                      "the whole truth: retraining for all its seeds and subsets.",
    # stereotypes and gradients
    r"ideal": "What a model without stereotypes has.",
    r"left_out": "Items that could not be scored.",
    r"moved": "L2 distance of the parameters from the start.",
    r"clip_factor": "Mean factor by which gradients are cut; 1 is not at all.",
    r"clipped": "Share of gradients that are cut.",
    r"snr": "Clipped signal of a batch of this group divided by the noise.",
    r"cosine": "Between the sums of gradients before and after clipping.",
    r"to_start": "Norm of the mean gradient divided by that at the start.",
    # memory of a step
    r"(\w+)_gb": "GB (10^9 bytes) on each device: {0}.",
    r"(h200|v5p)_seconds": "Predicted time of a step on {0}.",
    r"fits": "Devices whose memory holds the step.",
}  # fmt: skip

UNITS = {
    r"(\w+_)?nll": "nats/token",
    r"(\w+_)?accuracy|retain_perplexity_change|privleak|sign|sign_centred|top_recall": "%",
    r"verbmem|knowmem_\w+": "0 to 100",
    r"(\w+_)?seconds": "s",
}


def label(field: str) -> str:
    """Name a field for the axis of a plot, with its unit if it has one."""
    unit = next((unit for pattern, unit in UNITS.items() if re.fullmatch(pattern, field)), None)
    return field.replace("_", " ") + (f" ({unit})" if unit else "")


def meaning(field: str) -> str | None:
    """Say what a column means: the first pattern that fits the whole name, its groups put into the sentence."""
    for pattern, text in MEANINGS.items():
        if found := re.fullmatch(pattern, field):
            return text.format(*((group or "").replace("_", " ").strip() for group in found.groups()))
    return None
