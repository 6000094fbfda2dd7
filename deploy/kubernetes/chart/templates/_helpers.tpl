{{- define "runner.labels" -}}
app.kubernetes.io/part-of: untrusted-runner
{{- end }}

{{- define "runner.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What pods of builds may name: [""] is the nodes' default runtime. */}}
{{- define "runner.classes" -}}
{{- $names := list }}
{{- range $class := .Values.runtimeClasses }}
{{- if $class.enabled }}{{ $names = append $names $class.name }}{{ end }}
{{- end }}
{{- if .Values.container.allow }}{{ $names = append $names .Values.container.runtimeClass }}{{ end }}
{{- toJson (uniq $names) }}
{{- end }}

{{/* What runner writes, and what Kubernetes and Kueue add. */}}
{{- define "runner.annotations" -}}
{{- concat (list
  "cluster-autoscaler.kubernetes.io/safe-to-evict"
  "kubernetes.io/limit-ranger"
  "kueue.x-k8s.io/"
  "linkerd.io/inject"
  "sidecar.istio.io/inject"
) .Values.admission.annotations | toJson }}
{{- end }}

{{/* JSON's strings are strings of TOML as well. GATEWAY_ADDRESS is for the first container of the
gateway's pod to put in: nobody knows it before the Service is there. */}}
{{- define "runner.config" -}}
{{- $builds := .Values.builds }}
{{- with .Values.gateway.config }}{{ . | trim }}

{{ end -}}
[kubernetes]
gateway = "GATEWAY_ADDRESS:8443"
namespace = {{ .Values.namespaces.builds | toJson }}
gvisor = {{ .Values.runtimeClasses.gvisor.name | toJson }}
kata = {{ .Values.runtimeClasses.kata.name | toJson }}
container = {{ .Values.container.runtimeClass | toJson }}
pending_seconds = {{ $builds.pendingSeconds | int }}
{{- with $builds.repository }}
repository = {{ . | toJson }}
{{- end }}
{{- with $builds.forbidden }}
forbidden = {{ . | toJson }}
{{- end }}
{{- with $builds.pullSecrets }}
pull_secrets = {{ . | toJson }}
{{- end }}
{{- with $builds.priorityClass }}
priority_class = {{ . | toJson }}
{{- end }}
{{- with $builds.queue }}
queue = {{ . | toJson }}
{{- end }}
{{- with $builds.nodeSelector }}
[kubernetes.node_selector]
{{- range $key, $value := . }}
{{ $key | toJson }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{- range $builds.tolerations }}
[[kubernetes.tolerations]]
{{- range $key, $value := . }}
{{ $key }} = {{ $value | toJson }}
{{- end }}
{{- end }}
{{- end }}
