{{/* What the pods of this release, and no others, have. */}}
{{- define "example-go.selector" -}}
app: example-go
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What every object has. */}}
{{- define "example-go.labels" -}}
{{ include "example-go.selector" . }}
app.kubernetes.io/name: example-go
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
