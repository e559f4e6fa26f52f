use super::*;

/// A folder without a tokenizer: tokens need none.
fn options() -> ReadOptions<'static> {
    ReadOptions { model: Path::new("nowhere"), vocab_size: 100, max_seq_len: 4, train_on: None }
}

fn read(texts: &[&str], options: ReadOptions<'_>) -> Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..texts.len()).map(|i| folder.path().join(format!("{i}.jsonl"))).collect();
    for (path, text) in paths.iter().zip(texts) {
        std::fs::write(path, text).unwrap();
    }
    Dataset::read(&paths, options)
}

fn message(text: &str) -> String {
    read(&[text], options()).unwrap_err().to_string()
}

#[test]
fn shifts_by_document() {
    let text = "{\"input_ids\": [1, 2, 3], \"labels\": [-100, 2, 3], \"source\": {\"page\": [4]}}\n\n  {\"input_ids\": [5, 6]}\r\n";
    let data = read(&[text, "{\"input_ids\":[7,8],\"labels\":null}"], options()).unwrap();
    let documents: Vec<_> = (0..data.num_documents()).map(|i| data.document(i)).collect();
    assert_eq!(documents.iter().map(|d| d.ids).collect::<Vec<_>>(), [&[1, 2, 3][..], &[5, 6], &[7, 8]]);
    assert_eq!(documents.iter().map(|d| d.targets).collect::<Vec<_>>(), [&[2, 3, -100][..], &[6, -100], &[8, -100]]);
    assert_eq!(data.lengths(), [3, 2, 2]);
    let expected = Report { num_examples: 3, num_tokens: 7, num_targets: 4, num_truncated: 0, num_dropped: 0 };
    assert_eq!(data.report(), expected);
}

#[test]
fn cuts_and_drops_and_says_so() {
    // Cut to four tokens the first keeps three targets; the second loses its only target; the third has one token.
    let text = "{\"input_ids\":[1,2,3,4,5,6]}\n{\"input_ids\":[1,2,3,4,5],\"labels\":[-100,-100,-100,-100,5]}\n{\"input_ids\":[9]}\n";
    let data = read(&[text], options()).unwrap();
    assert_eq!((data.num_documents(), data.document(0).targets), (1, &[2, 3, 4, -100][..]));
    let expected = Report { num_examples: 1, num_tokens: 4, num_targets: 3, num_truncated: 2, num_dropped: 2 };
    assert_eq!(data.report(), expected);
    assert_eq!(data.report().target_share(), 0.75);
}

#[test]
fn malformed_json_names_line_and_column() {
    let text = message("{\"input_ids\":[1,2]}\n{\"input_ids\":[1,2}\n");
    assert!(text.contains("0.jsonl`, line 2, column 18: `input_ids`: expected `,` or `]`"), "{text}");
    let text = message("{\"input_ids\":[1,\"a\"]}");
    assert!(text.contains("line 1, column 19: `input_ids`: invalid type: string \"a\""), "{text}");
    assert!(
        message("{\"input_ids\":[1,2]}\n{\"labels\":[1]}").contains("line 2, column 14: missing field `input_ids`")
    );
    assert!(message("{\"input_ids\":[1], \"labels\": [1.5]}").contains("`labels`: invalid type: floating point"));
    assert!(message("[[1,2],[1,2]]").contains("line 1, column 1: expected a JSON object"));
    assert!(message("{\"input_ids\":[1,2]} x").contains("trailing characters"));
    assert!(!message("{\"input_ids\":[1,2").contains("at line"));
}

#[test]
fn values_are_checked() {
    assert!(message("{\"input_ids\":[]}").contains("line 1: `input_ids` is empty"));
    let text = message("\n{\"input_ids\":[1,100]}");
    assert!(
        text.contains("line 2: `input_ids` holds 100 at index 1") && text.contains("vocabulary size 100"),
        "{text}"
    );
    assert!(message("{\"input_ids\":[-1,1]}").contains("holds -1 at index 0"));
    assert!(message("{\"input_ids\":[1,2],\"labels\":[1]}").contains("`labels` has 1 entries, `input_ids` has 2"));
    assert!(message("{\"input_ids\":[1,2],\"labels\":[-100,-99]}").contains("`labels` holds -99 at index 1"));
    // Beyond the cut too: a file is right or wrong whatever the limit is.
    assert!(message("{\"input_ids\":[1,2,3,4,500]}").contains("holds 500 at index 4"));
}

#[test]
fn useless_files_are_errors() {
    for text in ["", "\n \n"] {
        assert!(message(text).contains("0.jsonl`: no examples"), "{}", message(text));
    }
    let text = message("{\"input_ids\":[1,2],\"labels\":[-100,-100]}\n{\"input_ids\":[3,4],\"labels\":[3,-100]}");
    assert!(text.contains("none of the 2 examples has a target"), "{text}");
    assert!(matches!(read(&["{\"input_ids\":[1,2]}", ""], options()), Err(Error::NoExamples { .. })));
    let zero = ReadOptions { max_seq_len: 0, ..options() };
    assert!(matches!(read(&["{\"input_ids\":[1,2]}"], zero), Err(Error::InvalidOption { field: "max_seq_len", .. })));
}

mod forms {
    //! Text, completions and chats with the tokenizers and templates of `tests/fixtures/chat`.

    use serde_json::{Value, json};

    use super::*;
    use crate::chat_template::tests::{fixtures, template};

    fn read_as(model: &Path, lines: &str, train_on: Option<TrainOn>) -> Result<Dataset> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        Dataset::read(&[path], ReadOptions { model, vocab_size: 1000, max_seq_len: 1000, train_on })
    }

    fn lines(examples: &[Value]) -> String {
        examples.iter().map(|example| format!("{example}\n")).collect()
    }

    /// Ids and labels of each document.
    fn documents(data: &Dataset) -> Vec<(Vec<i32>, Vec<i32>)> {
        let labels = |document: &Document<'_>| {
            // The label of the first token is nobody's target.
            std::iter::once(IGNORE_INDEX)
                .chain(document.targets[..document.targets.len() - 1].iter().copied())
                .collect()
        };
        (0..data.num_documents())
            .map(|index| data.document(index))
            .map(|document| (document.ids.to_vec(), labels(&document)))
            .collect()
    }

    /// The text and, in brackets, its trained parts.
    fn shown(data: &Dataset, model: &Path) -> String {
        let sample = data.sample(&Tokenizer::load(model).unwrap()).unwrap();
        assert!(!sample.is_cut);
        let piece = |piece: &Piece| if piece.is_trained { format!("[[{}]]", piece.text) } else { piece.text.clone() };
        sample.pieces.iter().map(piece).collect()
    }

    #[test]
    fn tokens_and_labels_are_those_of_trl() {
        let read =
            |file: &str| -> Value { serde_json::from_slice(&std::fs::read(fixtures().join(file)).unwrap()).unwrap() };
        let (forms, expected) = (read("forms.json"), read("trl.json"));
        let mut num_compared = 0;
        for (family, expected) in expected.as_object().unwrap() {
            for (form, examples) in forms.as_object().unwrap() {
                let (folder, _) = template(family, "chat_template.jinja");
                let data = read_as(folder.path(), &lines(examples.as_array().unwrap()), None).unwrap();
                let expected = expected[form].as_array().unwrap();
                assert_eq!(data.num_documents(), expected.len());
                for ((ids, labels), expected) in documents(&data).into_iter().zip(expected) {
                    let mut expected_labels: Vec<i32> = serde_json::from_value(expected["labels"].clone()).unwrap();
                    expected_labels[0] = IGNORE_INDEX;
                    assert_eq!((json!(ids), labels), (expected["ids"].clone(), expected_labels), "{family}, {form}");
                    num_compared += 1;
                }
            }
        }
        assert_eq!(num_compared, 24);
    }

    #[test]
    fn chats_of_other_forms_are_the_same_chats() {
        let (folder, _) = template("qwen2.5", "chat_template.jinja");
        let same = |examples: [Value; 2]| {
            let [first, second] = examples.map(|example| read_as(folder.path(), &lines(&[example]), None).unwrap());
            assert_eq!(documents(&first), documents(&second));
            shown(&first, folder.path())
        };
        let chat = same([
            json!({"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}),
            json!({"system": "Be short.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}),
        ]);
        let expected = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes?<|im_end|>\n]]";
        assert_eq!(chat, expected);
        let alpaca = same([
            json!({"messages": [{"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]}),
            json!({"instruction": "Add.", "input": "1 2", "output": "3"}),
        ]);
        assert!(alpaca.ends_with("user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n[[3<|im_end|>\n]]"), "{alpaca}");
    }

    #[test]
    fn alpaca_without_a_chat_template() {
        let (folder, _) = template("llama-2", "chat_template.jinja");
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        let read = |example: Value| read_as(folder.path(), &lines(&[example]), None).unwrap();
        let data = read(json!({"instruction": "Add {input}.", "input": "1 2", "output": "3"}));
        assert_eq!(
            shown(&data, folder.path()),
            "<s> Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n1 2\n\n\
             ### Response:\n[[3</s>]]"
        );
        let data = read(json!({"instruction": "Add.", "input": "", "output": "3"}));
        assert_eq!(
            shown(&data, folder.path()),
            "<s> Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\nAdd.\n\n### Response:\n[[3</s>]]"
        );
    }

    #[test]
    fn everything_is_learnt_when_asked_for() {
        let (folder, _) = template("chatml", "chat_template.jinja");
        for example in [
            json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]}),
            json!({"prompt": "a b", "completion": " c"}),
            json!({"instruction": "Add.", "output": "3"}),
            json!({"text": "a b c"}),
        ] {
            let data = read_as(folder.path(), &lines(&[example]), Some(TrainOn::All)).unwrap();
            assert_eq!(data.report().num_targets, data.report().num_tokens - 1);
        }
    }

    #[test]
    fn long_examples_are_cut_and_answers_beyond_the_cut_dropped() {
        let (folder, _) = template("chatml", "chat_template.jinja");
        let chat = |question: &str, answer: &str| json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]});
        let text = lines(&[chat("Hi", "Yes?"), chat("Hi", &"no ".repeat(50)), chat(&"why ".repeat(50), "So.")]);
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, text).unwrap();
        let options = ReadOptions { model: folder.path(), vocab_size: 1000, max_seq_len: 40, train_on: None };
        let report = Dataset::read(&[path], options).unwrap().report();
        assert_eq!((report.num_examples, report.num_truncated, report.num_dropped), (2, 2, 1));
        assert!(report.num_targets > 20 && report.num_targets < report.num_tokens, "{report:?}");
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_data() {
        let (folder, _) = template("chatml", "chat_template.jinja");
        let data = read_as(folder.path(), "\u{feff}{\"text\": \"a b\"}\n", None).unwrap();
        assert_eq!(shown(&data, folder.path()), "a[[ b<|im_end|>]]");
    }

    #[test]
    fn wrong_examples_are_errors_with_file_and_line() {
        let (folder, _) = template("gemma-2", "chat_template.jinja");
        let good = r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
        let message = |line: &str| {
            let error = read_as(folder.path(), &format!("{good}\n{line}\n"), None).unwrap_err();
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(error) = source {
                text += &format!(": {error}");
                source = error.source();
            }
            text
        };
        for (line, parts) in [
            (r#"{"text": "x"}"#, &["data.jsonl`, line 2: `messages` is missing or null"][..]),
            (r#"{"messages": []}"#, &["line 2: `messages` is empty"]),
            (r#"{"messages": "x"}"#, &["line 2: `messages` is a string, must be a list"]),
            (
                r#"{"messages": [{"role": "narrator", "content": "x"}]}"#,
                &["line 2", "role `narrator` in message 1", "system, developer"],
            ),
            (
                r#"{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}"#,
                &["data.jsonl`, line 2", "chat_template.jinja`, line 1 of", "roles must alternate"],
            ),
            (r#"{"messages": [{"role": "system", "content": "x"}]}"#, &["line 2", "System role not supported"]),
            (
                r#"{"messages": [{"role": "user"}]}"#,
                &["line 2: `messages` is wrong in message 1: `content` is missing"],
            ),
            (r#"{"messages": [{"role": "user", "content": "x"}"#, &["line 2, column 46", "EOF"]),
        ] {
            let text = message(line);
            assert!(parts.iter().all(|part| text.contains(part)), "{line}: {text}");
        }
        let read = |lines: &str, train_on| read_as(folder.path(), lines, train_on).unwrap_err().to_string();
        let text = read(r#"{"prompt": "x", "chosen": "y", "rejected": "z"}"#, None);
        assert!(
            text.contains(
                "line 1: no known form of example, found `chosen`, `prompt`, `rejected`; expected `messages`"
            ),
            "{text}"
        );
        assert!(read("{}", None).contains("found no field"));
        assert!(read(r#"{"text": 3}"#, None).contains("line 1: `text` is a number, must be a string"));
        assert!(
            read(r#"{"prompt": "x", "completion": ["y"]}"#, None).contains("`completion` is a list, must be a string")
        );
        let text = read(r#"{"text": "x"}"#, Some(TrainOn::Answers));
        assert!(text.contains("train_on = answers, must be all for plain text, as in `"), "{text}");
        let text = read(r#"{"input_ids": [1, 2]}"#, Some(TrainOn::All));
        assert!(text.contains("train_on = all, must be absent"), "{text}");
        let text = read(r#"{"instruction": "x", "output": "y", "history": [["a", "b"]]}"#, None);
        assert!(text.contains("`history` is not read"), "{text}");
        let bytes = b"{\"text\": \"a\xff\"}".to_vec();
        let path = folder.path().join("bytes.jsonl");
        std::fs::write(&path, bytes).unwrap();
        let options = ReadOptions { model: folder.path(), vocab_size: 1000, max_seq_len: 10, train_on: None };
        let text = Dataset::read(std::slice::from_ref(&path), options).unwrap_err().to_string();
        assert!(text.contains("bytes.jsonl`, line 1, column 12: invalid unicode code point"), "{text}");
        std::fs::write(&path, r#"{"text": "abc"}"#).unwrap();
        let text = Dataset::read(&[path], ReadOptions { vocab_size: 300, ..options }).unwrap_err().to_string();
        assert!(
            text.contains("line 1: `text` becomes token") && text.contains("vocabulary size of the model is 300"),
            "{text}"
        );
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        assert!(read(good, None).contains("has no chat template"));
        std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
        assert!(read(r#"{"text": "x"}"#, None).contains("tokenizer.json"));
    }

    #[test]
    fn an_answer_without_bounds_is_an_error() {
        let (folder, _) = template("chatml", "chat_template.jinja");
        // The length of the conversation is printed before everything, and that of every answer after it.
        let source = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content | length }}{% endfor %}";
        std::fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
        let turns = r#"{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}"#;
        let line = format!("{{\"messages\": [{turns}, {turns}]}}");
        let text = read_as(folder.path(), &line, None).unwrap_err().to_string();
        assert!(text.contains("data.jsonl`, line 1: cannot tell where the answer in message 2 begins"), "{text}");
        assert!(text.contains("{% generation %}"), "{text}");
        assert_eq!(read_as(folder.path(), &line, Some(TrainOn::All)).unwrap().num_documents(), 1);
    }
}
