"""The process that converts a Hugging Face folder: upstream's convert_hf_to_gguf.py with what it lacks for us.

    python upstream.py UPSTREAM_FOLDER PRE_TOKENIZER [options of convert_hf_to_gguf.py]

PRE_TOKENIZER: the name to write for a tokenizer that upstream does not recognise, or an empty string. The last line
that is printed is the error, if there is one. Imports nothing of this package, so that it needs no native library.
"""

from pathlib import Path
import sys


def main() -> None:
    # this file's own folder must not stand in for modules of torch's or transformers'
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    upstream, pre_tokenizer, *options = sys.argv[1:]
    sys.path[:0] = [upstream, str(Path(upstream) / "gguf-py")]
    convert(pre_tokenizer, options)


def convert(pre_tokenizer: str, options: list) -> None:
    """Upstream's main(), in this process; upstream's folder is on sys.path. `options` begins with the model's folder."""
    run_no_code_of_models()
    from conversion import TEXT_MODEL_MAP, ModelBase, ModelType, TextModel, get_model_architecture, get_model_class
    import convert_hf_to_gguf

    architecture = get_model_architecture(ModelBase.load_hparams(Path(options[0]), False), ModelType.TEXT)
    if architecture not in TEXT_MODEL_MAP:
        sys.exit(
            f"architecture {architecture} is not supported by llama.cpp's converter; "
            f"the Mixture-of-Experts ones that are: {', '.join(moe_architectures())}"
        )
    if get_model_class(architecture).supports_mtp_export:
        # Layers that predict further tokens: llama.cpp does not run them with the model, and folders that transformers
        # has written lack them, which upstream takes for an error.
        options = [*options, "--no-nextn"]
    if pre_tokenizer:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    sys.argv = [convert_hf_to_gguf.__file__, *options]
    convert_hf_to_gguf.main()


def run_no_code_of_models() -> None:
    """Upstream has some tokenizers' Python code run by transformers: what a model brings along, or names elsewhere."""
    import transformers.dynamic_module_utils as dynamic

    resolve = dynamic.resolve_trust_remote_code

    def resolve_without(trust_remote_code, model, has_local_code, has_remote_code, *args, **kwargs) -> bool:
        if trust_remote_code is not False and has_remote_code and not has_local_code:
            sys.exit(
                "its tokenizer is Python code of its own, which is never run here; read that code, convert the model "
                "with llama.cpp's convert_hf_to_gguf.py, which runs it, and give the GGUF file"
            )
        return resolve(False, model, has_local_code, has_remote_code, *args, **kwargs)

    # the modules that call it take it from there when they are imported
    dynamic.resolve_trust_remote_code = resolve_without


def moe_architectures() -> list:
    """Names of the architectures whose GGUF form can have experts."""
    from conversion import ModelBase, ModelType, load_all_models
    import gguf

    load_all_models()
    experts = gguf.MODEL_TENSOR.FFN_DOWN_EXP
    found = ModelBase._model_classes[ModelType.TEXT].items()
    return sorted(name for name, model in found if experts in gguf.MODEL_TENSORS[model.model_arch])


if __name__ == "__main__":
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
