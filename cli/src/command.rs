//! The tree of verbs, and what each does. Every verb that is listed works; the others come with their servers.

use std::io::Write;
use std::path::{Path, PathBuf};

use bulkhead_proto::limits;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::field::environment_entry;
use crate::image::{Layout, Manifest, PackOptions, pack};
use crate::refusal::{Code, Exit, Refusal};

/// Bytes of a program to be packed; it is held in memory.
const PROGRAM_BYTES: u64 = 512 << 20;

/// The `bulkhead` command line.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    about = "Commands a Bulkhead cluster",
    disable_help_subcommand = true
)]
pub struct CommandLine {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Makes and checks images
    #[command(subcommand)]
    Image(ImageVerb),
    /// Prints the version
    Version {
        #[command(flatten)]
        output: Output,
    },
    /// Prints a completion script
    Completion {
        /// The shell that it is for
        shell: clap_complete::Shell,
    },
    /// Prints the manual page of a command
    Man {
        /// The command, like: image pack
        command: Vec<String>,
    },
    /// Prints the help of a command or a topic (exit-codes, errors)
    Help {
        /// The command or topic
        topic: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Makes an OCI image of one static program
    Pack(Pack),
    /// Checks an OCI layout, folder or tar, without a cluster
    Check {
        /// The layout
        path: PathBuf,
        /// The image's name inside the layout
        #[arg(short, long)]
        tag: Option<String>,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, Args)]
struct Pack {
    /// The static program
    program: PathBuf,
    /// Name of the image, like web:1
    #[arg(short, long, value_parser = image_name)]
    tag: String,
    /// The tar to write; it must not exist
    #[arg(short, long)]
    output: PathBuf,
    /// Entry point instead of the program; once for each word
    #[arg(long, allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// NAME=value in every task of the image
    #[arg(short, long, value_parser = variable)]
    env: Vec<String>,
    /// uid[:gid] that it runs as; not root unless said
    #[arg(short, long, value_parser = numeric_user)]
    user: Option<String>,
}

#[derive(Debug, Args)]
struct Output {
    /// How results are printed
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// For people
    Table,
    /// One document
    Json,
    /// One object on each line
    Jsonl,
}

/// Does what the line says; results go to `out`.
pub fn run(line: CommandLine, out: &mut dyn Write) -> Result<Exit, Refusal> {
    let text = match line.verb {
        Verb::Image(ImageVerb::Pack(options)) => pack_file(&options)?,
        Verb::Image(ImageVerb::Check { path, tag, output }) => {
            let image = Layout::open(&path)?.verify(tag.as_deref())?;
            describe(&image, output.format)
        }
        Verb::Version { output } => version(output.format),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut CommandLine::command(), "bulkhead", &mut script);
            String::from_utf8_lossy(&script).into_owned()
        }
        Verb::Man { command } => manual(&command)?,
        Verb::Help { topic } => help(&topic)?,
    };
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who reads has seen enough, as `| head` does.
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Refusal::new(
            Code::Unwritable,
            "stdout",
            e.to_string(),
            "check where the output goes",
        )),
        _ => Ok(Exit::Done),
    }
}

fn pack_file(options: &Pack) -> Result<String, Refusal> {
    let program = read_bounded(&options.program, PROGRAM_BYTES)?;
    let name = options
        .program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let packed = pack(
        &program,
        &PackOptions {
            program_name: name,
            reference: Some(options.tag.clone()),
            entrypoint: options.entrypoint.clone(),
            environment: options.env.clone(),
            user: options.user.clone(),
        },
    )?;
    write_new(&options.output, &packed.archive)?;
    Ok(format!("{}\n", packed.manifest))
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, Refusal> {
    use std::io::Read;
    let place = path.display().to_string();
    let unreadable =
        |e: std::io::Error| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path");
    let mut content = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(limit + 1)
        .read_to_end(&mut content)
        .map_err(unreadable)?;
    if content.len() as u64 > limit {
        let reason = format!("it is over {limit} bytes");
        return Err(Refusal::new(Code::OverLimit, &place, reason, "strip the program"));
    }
    Ok(content)
}

/// Writes a file whole or not at all, and over nothing: the name appears once the content is on disk.
fn write_new(path: &Path, content: &[u8]) -> Result<(), Refusal> {
    let place = path.display().to_string();
    let refuse = |e: std::io::Error| {
        Refusal::new(
            Code::Unwritable,
            &place,
            e.to_string(),
            "choose a new name in a writable folder",
        )
    };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(refuse)?;
    file.write_all(content)
        .and_then(|()| file.as_file().sync_all())
        .map_err(refuse)?;
    file.persist_noclobber(path).map_err(|e| refuse(e.error))?;
    Ok(())
}

fn describe(image: &Manifest, format: Format) -> String {
    let bytes: u64 = image.layers.iter().map(|layer| layer.size).sum();
    let name = image.reference.as_deref();
    match format {
        Format::Table => {
            let mut rows = format!(
                "name      {}\nmanifest  {}\nconfig    {}\n",
                name.unwrap_or("-").escape_debug(),
                image.manifest.digest,
                image.config.digest
            );
            for layer in &image.layers {
                rows.push_str(&format!("layer     {}  {} bytes\n", layer.digest, layer.size));
            }
            rows
        }
        Format::Json | Format::Jsonl => {
            let layers: Vec<_> = image
                .layers
                .iter()
                .map(|l| serde_json::json!({ "digest": l.digest.to_string(), "size": l.size }))
                .collect();
            document(
                &serde_json::json!({
                    "name": name,
                    "manifest": image.manifest.digest.to_string(),
                    "config": image.config.digest.to_string(),
                    "layers": layers,
                    "layer_bytes": bytes,
                }),
                format,
            )
        }
    }
}

fn document(value: &serde_json::Value, format: Format) -> String {
    match format {
        Format::Json => format!("{value:#}\n"),
        Format::Table | Format::Jsonl => format!("{value}\n"),
    }
}

fn version(format: Format) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Table => format!("bulkhead {version}\n"),
        Format::Json | Format::Jsonl => document(&serde_json::json!({ "version": version }), format),
    }
}

fn manual(path: &[String]) -> Result<String, Refusal> {
    let refuse = |e: std::io::Error| Refusal::new(Code::Unwritable, "manual", e.to_string(), "try again");
    let mut page = Vec::new();
    clap_mangen::Man::new(find(path)?)
        .render(&mut page)
        .map_err(refuse)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn help(topic: &[String]) -> Result<String, Refusal> {
    match topic {
        [one] if one == "exit-codes" => {
            let row = |exit: &Exit| format!("{:>4}  {}\n", *exit as u8, exit.meaning());
            Ok(Exit::ALL.iter().map(row).collect())
        }
        [one] if one == "errors" => {
            let row = |code: &Code| {
                format!(
                    "{}  exit {}  {}\n",
                    code.as_str(),
                    code.exit() as u8,
                    code.title()
                )
            };
            Ok(Code::ALL.iter().map(row).collect())
        }
        path => Ok(find(path)?.render_long_help().to_string()),
    }
}

/// The command at this path, named whole, for its help and manual page.
fn find(path: &[String]) -> Result<clap::Command, Refusal> {
    let mut command = CommandLine::command();
    command.build();
    for word in path {
        command = command.find_subcommand(word).cloned().ok_or_else(|| {
            let reason = format!("there is no '{}'", path.join(" "));
            Refusal::new(
                Code::UnknownTopic,
                "help",
                reason,
                "'bulkhead help' lists the commands",
            )
        })?;
    }
    Ok(command)
}

fn variable(text: &str) -> Result<String, String> {
    environment_entry(text).map_err(|e| e.one_line())
}

fn image_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && text.len() <= limits::IMAGE_REFERENCE_CHARS && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Err("write NAME:TAG of letters, digits, '.', '_', '-' and '/', at most 255".into())
}

fn numeric_user(text: &str) -> Result<String, String> {
    // Only ids that the task's own range of 65,536 can hold.
    let id = |part: &str| part.bytes().all(|b| b.is_ascii_digit()) && part.parse::<u16>().is_ok();
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    if id(user) && id(group) {
        return Ok(text.to_owned());
    }
    Err("write uid or uid:gid, numbers from 0 to 65535".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(words: &[&str]) -> Result<String, Exit> {
        let mut out = Vec::new();
        let line = CommandLine::try_parse_from(words).map_err(|_| Exit::Usage)?;
        run(line, &mut out).map_err(|e| e.exit())?;
        Ok(String::from_utf8(out).expect("text"))
    }

    #[test]
    fn the_tree_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn help_topics_and_their_refusals() {
        let topic = output(&["bulkhead", "help", "exit-codes"]).expect("a topic");
        assert!(topic.contains("   7  cannot be placed"), "{topic}");
        assert!(
            output(&["bulkhead", "help", "image", "pack"])
                .expect("a verb")
                .contains("--entrypoint")
        );
        assert_eq!(output(&["bulkhead", "help", "nonsense"]), Err(Exit::NotFound));
        assert_eq!(output(&["bulkhead", "imgae"]), Err(Exit::Usage));
    }

    #[test]
    fn every_shell_gets_a_script_and_every_verb_a_page() {
        for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
            assert!(
                output(&["bulkhead", "completion", shell])
                    .expect(shell)
                    .contains("bulkhead")
            );
        }
        assert!(
            output(&["bulkhead", "man", "image", "pack"])
                .expect("a page")
                .contains(".TH")
        );
    }

    #[test]
    fn users_are_numbers_of_the_range() {
        for good in ["0", "65535", "1000:1000"] {
            assert!(numeric_user(good).is_ok(), "{good}");
        }
        for bad in ["", "root", "65536", "4294967296", "1:", ":1", "+1", "1:2:3"] {
            assert!(numeric_user(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_that_exists_is_not_written_over() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("x.tar");
        write_new(&path, b"one").expect("a new file");
        assert_eq!(
            write_new(&path, b"two").map_err(|e| e.code()),
            Err(Code::Unwritable)
        );
        assert_eq!(std::fs::read(&path).expect("it is there"), b"one");
    }
}
