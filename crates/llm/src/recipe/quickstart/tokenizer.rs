//! A byte-level BPE trained on the stories, and the files that make a folder a model's.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::{
    AddedToken,
    decoders::byte_level::ByteLevel,
    models::{
        TrainerWrapper,
        bpe::{BPE, BpeTrainer},
    },
};

use super::size::{MAX_SEQ_LEN, Size};
use crate::{Error, Result, atomic};

/// Most tokens. The stories have fewer different words than that, so that each of them becomes one token.
const MAX_VOCAB_SIZE: usize = 1024;

/// Ends a story, and an answer; the first token.
const END: &str = "<|end|>";
const USER: &str = "<|user|>";
const ASSISTANT: &str = "<|assistant|>";

/// Turns of a user and an assistant. The stories have none of the tokens that begin a turn.
const CHAT_TEMPLATE: &str = "\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user|>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' + message['content'] + eos_token -}}
    {%- else -%}
        {{- raise_exception('only user and assistant talk here') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
";

/// Trains a tokenizer on `texts` and writes all that a model needs but its weights: `config.json`, `generation_config.json`,
/// `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. Returns the number of tokens.
///
/// # Errors
/// [`Error::Tokenizer`], [`Error::Io`].
pub(super) fn write_blueprint(folder: &Path, texts: &[String], size: &Size) -> Result<usize> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let path = folder.join("tokenizer.json");
    let tokenizer = train(texts).map_err(|source| Error::Tokenizer { path: path.clone(), source })?;
    let text = tokenizer.to_string(true).map_err(|source| Error::Tokenizer { path: path.clone(), source })?;
    atomic::write(&path, text.as_bytes())?;
    let vocab_size = tokenizer.get_vocab_size(true);
    atomic::write_json(&folder.join("tokenizer_config.json"), &tokenizer_config())?;
    atomic::write(&folder.join("chat_template.jinja"), CHAT_TEMPLATE.as_bytes())?;
    atomic::write_json(&folder.join("config.json"), &model_config(size, vocab_size))?;
    atomic::write_json(&folder.join("generation_config.json"), &json!({"eos_token_id": 0}))?;
    Ok(vocab_size)
}

fn train(texts: &[String]) -> tokenizers::Result<tokenizers::Tokenizer> {
    let special = [END, USER, ASSISTANT].map(|text| AddedToken::from(text, true));
    let trainer = BpeTrainer::builder()
        .vocab_size(MAX_VOCAB_SIZE)
        .show_progress(false)
        .special_tokens(special.into())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes)).with_post_processor(Some(bytes));
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts.iter())?;
    Ok(tokenizer)
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": false,
        "model_max_length": MAX_SEQ_LEN,
    })
}

/// A Llama in the form of transformers 4, which 5 reads as well.
fn model_config(size: &Size, vocab_size: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_SEQ_LEN,
        "tie_word_embeddings": true,
        "initializer_range": size.initializer_range,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        chat_template::ChatTemplate,
        config::DecoderConfig,
        recipe::quickstart::{
            corpus::Corpus,
            words::{COLOURS, FEELINGS, PEOPLE, PLACES, THINGS},
        },
        tokenizer::Tokenizer,
    };

    #[test]
    fn a_blueprint_is_a_model_without_weights() {
        let folder = tempfile::tempdir().unwrap();
        let size = Size { num_stories: 600, ..Size::TINY };
        let corpus = Corpus::draw(0, &size);
        let vocab_size = write_blueprint(folder.path(), &corpus.stories, &size).unwrap();

        let config = DecoderConfig::load(folder.path()).unwrap();
        assert_eq!(
            (config.vocab_size, config.hidden_size, config.eos_token_ids),
            (vocab_size, size.hidden_size, vec![0])
        );
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        let names = PEOPLE.iter().map(|person| person.name);
        for word in names.chain(PLACES).chain(THINGS).chain(COLOURS).chain(FEELINGS) {
            assert_eq!(tokenizer.encode(&format!(" {word}")).unwrap().len(), 1, "{word}");
        }
        // Bytes that no story has are tokens all the same.
        for text in [corpus.stories[0].as_str(), "größer \u{1f980}"] {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text).unwrap()).unwrap(), text);
        }

        let prompt = ChatTemplate::load(folder.path()).unwrap().unwrap().prompt("Who?").unwrap();
        assert_eq!(prompt, "<|user|>Who?<|assistant|>");
        let ids = tokenizer.encode_rendered(&prompt).unwrap();
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
    }
}
