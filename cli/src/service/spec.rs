//! From the flags of `service create` and `service update` to a spec, and from a spec to JSON.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    Constraint, Label, PublishedPort, Resources, RestartCondition, RestartPolicy, SecretReference,
    ServiceSpec, TmpfsMount, UpdatePolicy,
};
use clap::Args;
use serde_json::{Value, json};

use super::Waiting;
use crate::command::{image_name, numeric_user, variable};
use crate::field;
use crate::output::text;
use crate::quantity;
use crate::refusal::{Code, Refusal};
use crate::secret::name;

/// Flags of `service create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// The image, one of 'bulkhead image ls'
    #[arg(value_parser = image_name)]
    image: String,
    /// Its name
    #[arg(long, value_parser = name)]
    name: String,
    /// How many of it run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=i64::from(limits::REPLICAS)))]
    replicas: u32,
    /// NAME=value in each task
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<String>,
    /// A file of NAME=value lines; --env wins over it
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// A secret, as the file /run/secrets/NAME
    #[arg(long, value_name = "NAME", value_parser = name)]
    secret: Vec<String>,
    /// HOST:TARGET, a port of each node that runs a replica
    #[arg(short, long, value_name = "HOST:TARGET", value_parser = port)]
    publish: Vec<PublishedPort>,
    /// KEY==VALUE or KEY!=VALUE that a node must meet
    #[arg(long, value_name = "KEY==VALUE", value_parser = constraint)]
    constraint: Vec<Constraint>,
    /// CPUs that a node must have free, like 0.5
    #[arg(long, value_name = "CPUS", value_parser = cpus)]
    reserve_cpu: Option<u64>,
    /// Memory that a node must have free, like 256m
    #[arg(long, value_name = "SIZE", value_parser = size)]
    reserve_memory: Option<u64>,
    #[command(flatten)]
    limits: Limits,
    /// When an ended task is started again
    #[arg(long, value_name = "none|on-failure|any", value_parser = condition)]
    restart_condition: Option<RestartCondition>,
    /// How long after its end
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    restart_delay: Option<Duration>,
    /// How often at most; 0: no bound
    #[arg(long, value_name = "COUNT")]
    restart_max_attempts: Option<u32>,
    /// A label, key=value
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = field::label_value)]
    label: Vec<Label>,
    /// uid[:gid] instead of the image's
    #[arg(short, long, value_parser = numeric_user)]
    user: Option<String>,
    /// A writable folder in memory, PATH or PATH:size=64m
    #[arg(long, value_name = "PATH", value_parser = tmpfs)]
    tmpfs: Vec<TmpfsMount>,
    /// How long a task may take to stop
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    stop_grace_period: Option<Duration>,
    #[command(flatten)]
    pub(super) waiting: Waiting,
    /// What runs instead of the image's own command
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// What a task may use at most.
#[derive(Debug, Args)]
struct Limits {
    /// CPUs that a task may use, like 0.5
    #[arg(long, value_name = "CPUS", value_parser = cpus)]
    limit_cpu: Option<u64>,
    /// Memory that a task may use, like 256m
    #[arg(long, value_name = "SIZE", value_parser = size)]
    limit_memory: Option<u64>,
    /// Processes that a task may have
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    limit_pids: Option<u32>,
}

impl Limits {
    fn apply(&self, spec: &mut ServiceSpec) {
        let limit = spec.limit.get_or_insert_default();
        limit.cpu_millis = self.limit_cpu.unwrap_or(limit.cpu_millis);
        limit.memory_bytes = self.limit_memory.unwrap_or(limit.memory_bytes);
        limit.pids = self.limit_pids.unwrap_or(limit.pids);
    }
}

/// Flags of `service update` that change the spec.
#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// Another image
    #[arg(long, value_parser = image_name)]
    image: Option<String>,
    /// How many of it run
    #[arg(long, value_parser = clap::value_parser!(u32).range(..=i64::from(limits::REPLICAS)))]
    replicas: Option<u32>,
    /// Sets NAME=value
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env_add: Vec<String>,
    /// Removes a variable
    #[arg(long, value_name = "NAME")]
    env_rm: Vec<String>,
    /// Sets a label, key=value
    #[arg(long, value_name = "KEY=VALUE", value_parser = field::label_value)]
    label_add: Vec<Label>,
    /// Removes a label
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    #[command(flatten)]
    limits: Limits,
}

fn port(text: &str) -> Result<PublishedPort, String> {
    field::published_port(text).map_err(|e| e.one_line())
}

fn constraint(text: &str) -> Result<Constraint, String> {
    field::constraint(text).map_err(|e| e.one_line())
}

fn tmpfs(text: &str) -> Result<TmpfsMount, String> {
    field::tmpfs(text).map_err(|e| e.one_line())
}

fn cpus(text: &str) -> Result<u64, String> {
    quantity::cpus(text).map_err(|e| e.one_line())
}

fn size(text: &str) -> Result<u64, String> {
    quantity::size(text).map_err(|e| e.one_line())
}

fn duration(text: &str) -> Result<Duration, String> {
    quantity::duration(text).map_err(|e| e.one_line())
}

fn condition(text: &str) -> Result<RestartCondition, String> {
    match text {
        "none" => Ok(RestartCondition::None),
        "on-failure" => Ok(RestartCondition::OnFailure),
        "any" => Ok(RestartCondition::Any),
        _ => Err("one of none, on-failure, any".into()),
    }
}

pub(super) fn scale(text: &str) -> Result<(String, u32), String> {
    let (service, count) = text.split_once('=').ok_or("write SERVICE=REPLICAS, like web=3")?;
    match count.parse::<u32>() {
        Ok(count) if count <= limits::REPLICAS && !service.is_empty() => Ok((service.to_owned(), count)),
        _ => Err(format!(
            "write SERVICE=REPLICAS with at most {} replicas",
            limits::REPLICAS
        )),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Create {
    /// The spec that these flags ask for; what they do not say is left to the cluster's defaults.
    pub(super) fn spec(self) -> Result<ServiceSpec, Refusal> {
        let mut environment = Vec::new();
        for path in &self.env_file {
            for entry in environment_file(path)? {
                set_variable(&mut environment, entry);
            }
        }
        for entry in self.env {
            set_variable(&mut environment, entry);
        }
        let secret = |name: String| SecretReference {
            secret_id: Vec::new(),
            name,
        };
        let mut spec = ServiceSpec {
            name: self.name,
            labels: self.label,
            replicas: self.replicas,
            image_name: self.image,
            command: self.command,
            environment,
            user: self.user.unwrap_or_default(),
            tmpfs: self.tmpfs,
            secrets: self.secret.into_iter().map(secret).collect(),
            ports: self.publish,
            constraints: self.constraint,
            reservation: Some(Resources {
                cpu_millis: self.reserve_cpu.unwrap_or_default(),
                memory_bytes: self.reserve_memory.unwrap_or_default(),
                pids: 0,
            }),
            restart: Some(RestartPolicy {
                condition: self.restart_condition.unwrap_or(RestartCondition::Any).into(),
                delay_ms: millis(self.restart_delay.unwrap_or(limits::RESTART_DELAY)),
                max_attempts: self.restart_max_attempts.unwrap_or_default(),
            }),
            update: Some(UpdatePolicy {
                parallelism: limits::UPDATE_PARALLELISM,
                monitor_ms: millis(limits::UPDATE_MONITOR),
            }),
            stop_grace_ms: millis(self.stop_grace_period.unwrap_or(limits::STOP_GRACE)),
            ..Default::default()
        };
        self.limits.apply(&mut spec);
        Ok(spec)
    }
}

impl Changes {
    /// Changes a spec as the flags say.
    pub(super) fn apply(&self, spec: &mut ServiceSpec) -> Result<(), Refusal> {
        if let Some(image) = &self.image {
            // The manager resolves the name anew; a digest that stayed would pin the old image.
            spec.image_name.clone_from(image);
            spec.image_id.clear();
            spec.image_digest.clear();
        }
        spec.replicas = self.replicas.unwrap_or(spec.replicas);
        for name in &self.env_rm {
            let before = spec.environment.len();
            spec.environment.retain(|entry| variable_name(entry) != name);
            if spec.environment.len() == before {
                let reason = format!("the service has no variable '{name}'");
                let help = "'bulkhead service inspect' shows those it has";
                return Err(Refusal::new(Code::NotFound, "--env-rm", reason, help));
            }
        }
        for entry in &self.env_add {
            set_variable(&mut spec.environment, entry.clone());
        }
        spec.labels.retain(|label| !self.label_rm.contains(&label.key));
        for label in &self.label_add {
            spec.labels.retain(|kept| kept.key != label.key);
            spec.labels.push(label.clone());
        }
        self.limits.apply(spec);
        Ok(())
    }
}

fn environment_file(path: &std::path::Path) -> Result<Vec<String>, Refusal> {
    use std::io::Read;
    let place = path.display().to_string();
    let refuse = |e: std::io::Error| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path");
    let mut content = Vec::new();
    let file = std::fs::File::open(path).map_err(refuse)?;
    // One byte past the limit, so that a longer file is refused and never half read.
    file.take(field::ENVIRONMENT_FILE_BYTES as u64 + 1)
        .read_to_end(&mut content)
        .map_err(refuse)?;
    field::environment_file(&content)
}

fn variable_name(entry: &str) -> &str {
    entry.split_once('=').map_or(entry, |(name, _)| name)
}

/// Sets a variable in its place, or at the end.
fn set_variable(entries: &mut Vec<String>, entry: String) {
    match entries
        .iter_mut()
        .find(|kept| variable_name(kept) == variable_name(&entry))
    {
        Some(kept) => *kept = entry,
        None => entries.push(entry),
    }
}

/// A spec as scripts read it. Values that the cluster fills in are marked as defaults.
pub(crate) fn json(spec: &ServiceSpec) -> Value {
    let limit = spec.limit.unwrap_or_default();
    let reservation = spec.reservation.unwrap_or_default();
    let restart = spec.restart.unwrap_or_default();
    let update = spec.update.unwrap_or_default();
    let or_default = |value: u64, default: u64| match value {
        0 => json!({ "value": default, "default": true }),
        value => json!({ "value": value, "default": false }),
    };
    json!({
        "name": spec.name,
        "labels": text::labels(&spec.labels),
        "replicas": spec.replicas,
        "image": spec.image_name,
        "image_digest": if spec.image_digest.is_empty() {
            Value::Null
        } else {
            format!("sha256:{}", crate::node::hex(&spec.image_digest)).into()
        },
        "command": spec.command,
        "arguments": spec.arguments,
        "environment": spec.environment,
        "user": spec.user,
        "tmpfs": spec.tmpfs.iter()
            .map(|t| json!({ "path": t.path, "size_bytes": t.size_bytes })).collect::<Vec<_>>(),
        "secrets": spec.secrets.iter()
            .map(|s| json!({ "name": s.name, "id": text::id(&s.secret_id) })).collect::<Vec<_>>(),
        "ports": spec.ports.iter()
            .map(|p| json!({ "host": p.host, "target": p.target })).collect::<Vec<_>>(),
        "constraints": spec.constraints.iter()
            .map(|c| format!("{}{}{}", c.key, if c.equal { "==" } else { "!=" }, c.value)).collect::<Vec<_>>(),
        "reservation": { "cpu_millis": reservation.cpu_millis, "memory_bytes": reservation.memory_bytes },
        "limit": {
            "cpu_millis": limit.cpu_millis,
            "memory_bytes": or_default(limit.memory_bytes, limits::TASK_MEMORY_BYTES),
            "pids": or_default(limit.pids.into(), limits::TASK_PIDS.into()),
        },
        "restart": {
            "condition": match restart.condition() {
                RestartCondition::None => "none",
                RestartCondition::OnFailure => "on-failure",
                RestartCondition::Unspecified | RestartCondition::Any => "any",
            },
            "delay_ms": restart.delay_ms,
            "max_attempts": restart.max_attempts,
        },
        "update": { "parallelism": update.parallelism, "monitor_ms": update.monitor_ms },
        "stop_grace_ms": spec.stop_grace_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct CreateLine {
        #[command(flatten)]
        create: Create,
    }

    #[derive(Debug, Parser)]
    struct UpdateLine {
        #[command(flatten)]
        changes: Changes,
    }

    fn created(line: &str) -> Result<ServiceSpec, String> {
        let words = std::iter::once("create").chain(line.split_whitespace());
        let line = CreateLine::try_parse_from(words).map_err(|e| e.to_string())?;
        line.create.spec().map_err(|e| e.to_string())
    }

    #[test]
    fn every_flag_of_create_reaches_the_spec() {
        let spec = created(
            "--name web web:1 --replicas 3 --env A=1 -e A=2 --secret db-password --publish 8080:80 \
             --constraint node.role==worker --reserve-cpu 0.5 --reserve-memory 64m --limit-cpu 1 --limit-memory 128m \
             --limit-pids 9 --restart-condition on-failure --restart-delay 1s --restart-max-attempts 3 --label a=b \
             --user 1000 --tmpfs /cache --stop-grace-period 3s -- /bin/x --flag -d",
        )
        .expect("a good line");
        let json = json(&spec);
        for (pointer, want) in [
            ("/name", json!("web")),
            ("/image", json!("web:1")),
            ("/replicas", json!(3)),
            ("/environment", json!(["A=2"])),
            ("/secrets/0/name", json!("db-password")),
            ("/ports/0", json!({ "host": 8080, "target": 80 })),
            ("/constraints/0", json!("node.role==worker")),
            (
                "/reservation",
                json!({ "cpu_millis": 500, "memory_bytes": 64 << 20 }),
            ),
            ("/limit/cpu_millis", json!(1000)),
            ("/limit/memory_bytes/value", json!(128 << 20)),
            ("/limit/pids/value", json!(9)),
            ("/restart/condition", json!("on-failure")),
            ("/restart/delay_ms", json!(1000)),
            ("/restart/max_attempts", json!(3)),
            ("/labels/a", json!("b")),
            ("/user", json!("1000")),
            ("/tmpfs/0/path", json!("/cache")),
            ("/stop_grace_ms", json!(3000)),
            ("/command", json!(["/bin/x", "--flag", "-d"])),
        ] {
            assert_eq!(json.pointer(pointer), Some(&want), "{pointer}");
        }
    }

    #[test]
    fn what_is_not_said_is_the_safe_default() {
        let spec = json(&created("--name web web:1").expect("a short line"));
        assert_eq!(
            spec["limit"]["memory_bytes"],
            json!({ "value": 256 << 20, "default": true })
        );
        assert_eq!(spec["limit"]["pids"], json!({ "value": 512, "default": true }));
        assert_eq!(spec["restart"]["condition"], "any");
        assert_eq!(spec["replicas"], 1);
    }

    #[test]
    fn a_wrong_line_names_its_mistake() {
        for (line, part) in [
            ("web:1", "--name"),
            ("--name Web web:1", "BH-E0002"),
            ("--name web web:1 --replicas 10001", "10001"),
            ("--name web web:1 --publish 80:0", "not a port"),
            ("--name web web:1 --limit-memory lots", "BH-E0001"),
            ("--name web web:1 --restart-condition sometimes", "on-failure"),
            ("--name web web:1 command", "unexpected"),
            ("--name web web:1 --privileged", "--privileged"),
            ("--name web web:1 --env-file /nonexistent", "BH-E0010"),
        ] {
            let refused = created(line).expect_err(line);
            assert!(refused.contains(part), "{line}: {refused}");
        }
    }

    #[test]
    fn an_update_changes_what_it_names_and_nothing_else() {
        let before = ServiceSpec {
            image_id: vec![1],
            image_digest: vec![2],
            ..created("--name web web:1 -e A=1 -e B=2 --label x=1 --limit-memory 64m").expect("a good line")
        };
        let update = |line: &str| {
            let words = std::iter::once("update").chain(line.split_whitespace());
            let line = UpdateLine::try_parse_from(words).map_err(|e| e.to_string())?;
            let mut spec = before.clone();
            line.changes.apply(&mut spec).map_err(|e| e.to_string())?;
            Ok::<_, String>(spec)
        };
        let replicas = update("--replicas 5").expect("a good line");
        assert_eq!((replicas.replicas, &replicas.image_id), (5, &vec![1]));
        let image = update("--image web:2").expect("a good line");
        assert_eq!(
            (
                image.image_name.as_str(),
                image.image_id.len(),
                image.image_digest.len()
            ),
            ("web:2", 0, 0)
        );
        let env = update("--env-add B=3 --env-add C=4 --env-rm A").expect("a good line");
        assert_eq!(env.environment, ["B=3", "C=4"]);
        let limits = update("--limit-pids 7 --label-add x=2")
            .expect("a good line")
            .limit
            .unwrap_or_default();
        assert_eq!((limits.pids, limits.memory_bytes), (7, 64 << 20));
        assert!(update("--env-rm Z").is_err());
        assert_eq!(
            update("").as_ref(),
            Ok(&before),
            "the same again: a paused update goes on"
        );
    }

    #[test]
    fn a_scale_has_a_service_and_a_count() {
        assert_eq!(scale("web=3"), Ok(("web".into(), 3)));
        for bad in ["web", "=3", "web=-1", "web=x", "web=10001"] {
            assert!(scale(bad).is_err(), "{bad}");
        }
    }
}
